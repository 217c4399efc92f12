"""Finished runs as a table: a CSV row each, and mean and standard deviation over the seeds of each configuration.

python scripts/table_runs.py OUT.csv RUNS ...      RUNS: folders to search for result.json

Where runs of several configurations have quality without labels, its rank correlation with the probe's accuracy over
all runs follows: Spearman's, with a 95 % percentile interval of 2,000 resamples of the runs. alpha-ReQ is compared a
second time by minus its distance from 1, where its authors expect the best features.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import bootstrap, spearmanr

ACCURACY = "logreg-v1/top1"
RESAMPLES = 2000


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    out, folders = Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]
    rows, groups = [], defaultdict(list)
    for path in sorted(path for folder in folders for path in folder.rglob("result.json")):
        result = json.loads(path.read_text())
        row = {"run": result["run"], "seed": result["config"]["seed"], **result["metrics"]}
        row |= {f"seconds/{name}": value for name, value in result["seconds"].items()}
        row |= {name: result["machine"][name] for name in ("device", "threads")}
        row |= {name: result["versions"][name] for name in ("git", "torch")}
        rows.append(row)
        groups[result["group"]].append(row)
    if not rows:
        raise SystemExit(f"no result.json below {', '.join(map(str, folders))}")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for group, members in groups.items():
        print(f"{group}  n = {len(members)}")
        for name in members[0]:
            values = [row[name] for row in members]
            if "top1" in name or name == "seconds/total":
                factor, unit = (100, "%") if "top1" in name else (1, "s")
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                print(f"  {name:<40} {factor * statistics.mean(values):8.2f} ± {factor * spread:.2f} {unit}")
    if len(groups) > 1:
        for name, (rank, low, high) in rank_correlations(rows).items():
            print(
                f"rank correlation with {ACCURACY}: {name:<26} {rank:+.2f}  [{low:+.2f}, {high:+.2f}]  n = {len(rows)}"
            )


def rank_correlations(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """(Spearman's correlation with ``ACCURACY``, ends of its interval) of each metric of quality that all runs have."""
    shared = set.intersection(*(set(row) for row in rows))
    if ACCURACY not in shared:
        return {}
    columns = {name: [row[name] for row in rows] for name in rows[0] if name in shared and name.startswith("quality/")}
    for name in [name for name in columns if name.endswith("alpha_req")]:
        columns[f"-|{name} - 1|"] = [-abs(value - 1) for value in columns[name]]
    accuracy = [row[ACCURACY] for row in rows]
    found = {}
    for name, values in columns.items():
        interval = bootstrap(
            (values, accuracy), lambda x, y: spearmanr(x, y).statistic,
            paired=True, vectorized=False, n_resamples=RESAMPLES, method="percentile", random_state=0,
        ).confidence_interval  # fmt: skip
        found[name] = (spearmanr(values, accuracy).statistic, interval.low, interval.high)
    return found


if __name__ == "__main__":
    main()

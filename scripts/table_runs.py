"""Finished runs as a table: a CSV row each, and mean and standard deviation over the seeds of each configuration.

python scripts/table_runs.py OUT.csv RUNS ...      RUNS: folders to search for result.json
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


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
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
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


if __name__ == "__main__":
    main()

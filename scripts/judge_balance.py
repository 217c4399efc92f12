"""Does alpha trade attraction for repulsion, in one direction only? Judges the runs of conf/experiment/balance.yaml.

    scclr train -m experiment=balance alpha=0.2,0.35,0.5,0.6,0.7,0.8,0.9 seed=0,1,2      21 runs of 10 s on one core
    python scripts/judge_balance.py runs/balance

The prediction: with alpha, V_aug = 1 - E <F, F'> falls, and the repulsion tau E log E exp(<F, F°> / tau) at the
training's temperature rises. At exact minimizers this is so without exception.

The criterion: over the runs that have not collapsed (|mu|^2 <= 0.9), both rank correlations with alpha are at least 0.9
in absolute value, and no two neighbouring alphas are in the wrong order by more than two standard errors over seeds.

Writes scripts/results/balance.csv, with one row per run, and balance.png.
"""

import csv
import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"
COLLAPSED, LEAST_CORRELATION = 0.9, 0.9
SIGNS = {"v_aug": -1, "repel": 1}  # the predicted sign of the correlation with alpha


def read(folder: Path) -> list[dict[str, Any]]:
    """One row for each finished run."""
    rows = []
    for path in sorted(folder.glob("*/theory.json")):
        theory = json.loads(path.read_text())
        at = next(one for one in theory["bound"] if one["temperature"] == theory["temperature"])
        bias = {name: theory["z"]["bias"][name]["value"] for name in ("v_aug", "b2", "s_b", "mean_norm2")}
        seed = json.loads((path.parent / "result.json").read_text())["config"]["seed"]
        rows.append({"alpha": theory["alpha"], "seed": seed, "repel": at["repel_decoupled"]["value"], **bias})
    if not rows:
        raise SystemExit(f"no theory.json below {folder}")
    return sorted(rows, key=lambda row: (row["alpha"], row["seed"]))


def report(rows: list[dict[str, Any]]) -> None:
    """Print the verdict."""
    kept = [row for row in rows if row["mean_norm2"] <= COLLAPSED]
    alphas = sorted({row["alpha"] for row in kept})
    print(f"{len(rows)} runs, {len(rows) - len(kept)} of them collapsed")
    for name, sign in SIGNS.items():
        rho = float(spearmanr([row["alpha"] for row in kept], [row[name] for row in kept]).statistic)
        by_alpha = {alpha: [row[name] for row in kept if row["alpha"] == alpha] for alpha in alphas}
        means = "  ".join(f"{alpha:g}: {statistics.mean(values):.4f}" for alpha, values in by_alpha.items())
        reversals = []
        for low, high in pairwise(alphas):
            a, b = by_alpha[low], by_alpha[high]
            error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (a, b) if len(x) > 1))
            if sign * (statistics.mean(b) - statistics.mean(a)) < -2 * error:
                reversals.append(f"{low:g} to {high:g}")
        verdict = "HOLDS" if sign * rho >= LEAST_CORRELATION and not reversals else "FAILS"
        print(f"{name} by alpha: {means}")
        print(f"  rank correlation {rho:+.3f}, reversals: {', '.join(reversals) or 'none'}: {verdict}")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    labels = {"v_aug": "V_aug, variance between views", "repel": "repulsion", "b2": "B2 and S_B"}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for key, colour in ((name, "C0"), *((("s_b", "C1"),) if name == "b2" else ())):
            for kept in (True, False):
                part = [row for row in rows if (row["mean_norm2"] <= COLLAPSED) == kept]
                points = [row["alpha"] for row in part], [row[key] for row in part]
                text = {"b2": "B2", "s_b": "S_B"}.get(key) if kept else "collapsed" if key == "v_aug" else None
                axis.plot(*points, "o" if kept else "x", color=colour, markersize=4, label=text)
        axis.set(xlabel="alpha", ylabel=label)
    for axis in (axes[0], axes[2]):
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    rows = read(Path(sys.argv[1]))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "balance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "balance.png")
    report(rows)


if __name__ == "__main__":
    main()

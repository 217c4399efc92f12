"""Whether the bound on the supervised objective loosens as classes separate."""

from matplotlib.figure import Figure

from judges.verdict import (
    LEAST_SEEDS,
    NCC,
    UNDECIDED,
    Judge,
    Runs,
    Verdict,
    above,
    at_most,
    both,
    mean,
    ordered,
    pairs,
    rank,
    seeds,
    split,
    told,
)
from scclr.report.statistics import correlation

EPOCHS = "pretrain.epochs"
T5, T4 = "theory/bound/slack", "theory/bound/class_excluded_slack"
SHARE = 0.1  # of the growth of the one slack that the other may have


def training_length(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=training_length; its axes are pretrain.epochs and the seed.

    E8. Prediction: the slack of the bound T5 has the margin of the nearest class centre in it, so it grows with the
    accuracy z/ncc-v1/top1 as training goes on. T4', whose negatives are of other classes, has no such gap: its slack
    does not grow. Criterion: over runs, the rank correlation of the slack of T5 with the accuracy is above 0, and by
    seed it is larger after the longest training than after the shortest. That of T4' grows by at most a tenth of this,
    by its interval; it fails if its mean grows by more.
    """
    parts = list(split(runs, EPOCHS).values())
    rho = correlation([run.numbers[T5] for run in runs], [run.numbers[NCC] for run in runs])
    enough = len(parts) > 1 and seeds(runs) >= LEAST_SEEDS
    growth, other = (pairs(parts[-1], parts[0], name) if enough else [] for name in (T5, T4))
    margin = SHARE * max(0.0, mean(growth)) if growth else 0.0
    outcome = both(ordered(rho), above(growth)) if enough else UNDECIDED
    claims = "E8: the slack of T5 grows with the accuracy", "E8: the slack of T4' does not grow"
    return [
        Verdict(claims[0], outcome, f"{rank(rho)}; from the shortest to the longest training {told(growth)}"),
        Verdict(claims[1], at_most(other, margin), f"{told(other)}, of which {margin:.3g} is allowed"),
    ]


def draw(runs: Runs) -> Figure:
    """Both slacks against the accuracy; a colour for each number of epochs."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (metric, label) in zip(axes, {T5: "slack of T5", T4: "slack of T4'"}.items(), strict=True):
        for number, (epochs, part) in enumerate(split(runs, EPOCHS).items()):
            x, y = [100 * run.numbers[NCC] for run in part], [run.numbers[metric] for run in part]
            axis.plot(x, y, "o", markersize=4, color=f"C{number}", label=f"{epochs:g} epochs")
        axis.set(xlabel=f"{NCC}, %", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


JUDGE = Judge(training_length, axes=(EPOCHS,), needs=(T5, T4, NCC), draw=draw)

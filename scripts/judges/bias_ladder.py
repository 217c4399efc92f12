"""Whether augmentations with less bias give better accuracy."""

from itertools import combinations

from matplotlib.figure import Figure

from judges.verdict import (
    B2,
    FAILS,
    HOLDS,
    LEAST_SEEDS,
    PROBE,
    UNDECIDED,
    Judge,
    Runs,
    Verdict,
    by_augmentation,
    by_seed,
    differs,
    mean,
    ordered,
    pairs,
    rank,
    seeds,
)
from scclr.report.drawing import COLOURS, MARKERS
from scclr.report.runs import Run
from scclr.report.statistics import correlation, difference, holm

B1 = "theory/z/b1"
EQUAL, POINT = 0.05, 0.01  # of the range of B2; of the accuracy


def bias_ladder(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=bias_ladder; its axes are keys of augment and the seed, at one alpha.

    E5a. Prediction of Lee (2025), as public summaries have it: the accuracy (logreg-v1/top1, the linear evaluation of
    the paper) of an augmentation falls with its bias. The squared bias B2 is judged, and B1 too, since the norm of the
    paper is not known. Criterion: Spearman's rho over augmentations, of means over seeds, is below 0.

    Exploratory: do augmentations of equal bias differ in accuracy, as a reviewer of the paper objected? The pairs are
    those whose B2 differ by at most 5 % of its range over augmentations. It holds if for any of them Holm's p, of
    differences in pairs of seeds, is below 0.05, and fails if the intervals of all are within a point.
    """
    parts = list(by_augmentation(runs).values())
    accuracy = [mean(run.numbers[PROBE] for run in part) for part in parts]
    found = []
    for name in (B2, B1):
        rho = correlation([mean(run.numbers[name] for run in part) for part in parts], accuracy)
        outcome = ordered(rho, -1) if min(map(seeds, parts)) >= LEAST_SEEDS else UNDECIDED
        found.append(Verdict(f"E5a: {PROBE} falls with {name} over augmentations", outcome, rank(rho)))
    return [*found, _equal_bias(parts)]


def _equal_bias(parts: list[list[Run]]) -> Verdict:
    claim = "exploratory: augmentations of equal bias differ in accuracy"
    bias = [mean(run.numbers[B2] for run in part) for part in parts]
    near = EQUAL * (max(bias) - min(bias))
    chosen = [(a, b) for (a, x), (b, y) in combinations(zip(parts, bias, strict=True), 2) if abs(x - y) <= near]
    p = [difference(by_seed(a, PROBE), by_seed(b, PROBE)).p for a, b in chosen]
    corrected = iter(holm([value for value in p if value is not None]))
    outcomes, most = [], 0.0
    for (a, b), value in zip(chosen, p, strict=True):
        values = pairs(a, b, PROBE)
        outcomes.append(differs(values, None if value is None else next(corrected), POINT))
        most = max(most, abs(mean(values))) if values else most
    some = HOLDS if HOLDS in outcomes else UNDECIDED
    outcome = FAILS if outcomes and set(outcomes) == {FAILS} else some
    text = f"{outcomes.count(HOLDS)} of {len(chosen)} pairs differ; at most by {100 * most:.2f} points"
    return Verdict(claim, outcome, text)


def draw(runs: Runs) -> Figure:
    """Accuracy against B2; a colour for each augmentation, a point for each seed."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, part) in enumerate(by_augmentation(runs).items()):
        x, y = ([run.numbers[key] for run in part] for key in (B2, PROBE))
        marker, colour = MARKERS[number // len(COLOURS) % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axis.plot(x, [100 * value for value in y], marker, markersize=4, color=colour, label=name)
    axis.set(xlabel="B2, squared bias", ylabel=f"{PROBE}, %")
    figure.legend(loc="outside right upper", frameon=False, fontsize=6)
    return figure


JUDGE = Judge(bias_ladder, axes=("augment.",), needs=(B2, B1, PROBE), draw=draw)

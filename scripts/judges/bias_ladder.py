"""Whether augmentations with less bias give better accuracy."""

from itertools import combinations, product

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
    above,
    by_augmentation,
    by_seed,
    differs,
    mean,
    ordered,
    pairs,
    rank,
    seeds,
    split,
    told,
)
from scclr.report.drawing import COLOURS, MARKERS
from scclr.report.runs import Run, axes, shown
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

    Exploratory, and asked after the first runs: is it the same whatever removes the bias? For each key of the
    augmentation, from its first to its last value at the same other keys: the mean change of B2 and of the accuracy, by
    seed. That less bias is better along this key holds if the accuracy goes the other way than B2, by its interval, and
    fails if its mean goes the same way.
    """
    parts = list(by_augmentation(runs).values())
    accuracy = [mean(run.numbers[PROBE] for run in part) for part in parts]
    found = []
    for name in (B2, B1):
        rho = correlation([mean(run.numbers[name] for run in part) for part in parts], accuracy)
        outcome = ordered(rho, -1) if min(map(seeds, parts)) >= LEAST_SEEDS else UNDECIDED
        found.append(Verdict(f"E5a: {PROBE} falls with {name} over augmentations", outcome, rank(rho)))
    return [*found, _equal_bias(parts), *_along_each_key(runs)]


def _along_each_key(runs: Runs) -> list[Verdict]:
    varying = [key for key in axes(runs) if key.startswith("augment.")]
    divisions = {key: [{run.directory for run in part} for part in split(runs, key).values()] for key in varying}
    keys = {str(division): key for key, division in reversed(divisions.items())}  # one of those that vary together
    verdicts = []
    for key in reversed(keys.values()):
        others = [other for other in keys.values() if other != key]
        least, *_, most = split(runs, key).values()
        first, last = (shown(part[0].settings.get(key)) for part in (least, most))
        changes: dict[int, list[list[float]]] = {}
        for run, other in product(most, least):
            if run.seed == other.seed and all(run.settings.get(name) == other.settings.get(name) for name in others):
                change = [run.numbers[name] - other.numbers[name] for name in (B2, PROBE)]
                changes.setdefault(run.seed, []).append(change)
        bias, accuracy = ([mean(change[i] for change in seed) for seed in changes.values()] for i in (0, 1))
        sign = 1 if mean(bias) < 0 else -1
        claim = f"exploratory: less bias is better along {key}"
        text = f"from {first} to {last} B2 {told(bias)}; {PROBE} {told(accuracy, 100)}, in points"
        verdicts.append(Verdict(claim, above([sign * value for value in accuracy]), text))
    return verdicts


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

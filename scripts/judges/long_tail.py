"""Whether the best alpha and the bias move with the imbalance of the classes."""

from math import log

from matplotlib.figure import Figure

from judges.best_alpha import MARGIN, curves, judged, listed, moves
from judges.verdict import (
    ALPHA,
    B2,
    NORM,
    TEMPERATURE,
    Judge,
    Runs,
    Verdict,
    above,
    at_most,
    both,
    mean,
    pairs,
    split,
    told,
    uncollapsed,
)
from scclr.datasets.longtail import PROFILES, class_counts

IMBALANCE, BALANCED = "dataset.imbalance", "z/ncc-v1/balanced"
CLASSES, MANY_IMAGES = 10, 10**6


def long_tail(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=long_tail size=cpu_fashion; its axes are dataset.imbalance, alpha and seed.

    E4. Prediction: with imbalance the share kappa = sum_y p(y)^2 of pairs of one class grows, and with it the alpha
    that a class needs to stay apart (T11 on average over classes). So the best alpha, by the balanced accuracy of the
    nearest class centre of z, does not fall with the imbalance. Criterion, for each two neighbouring imbalances: by
    seed, the best alpha among those that were run; the mean change is at least -0.05, by its interval. It fails if a
    mean is below that. Undecided if the best alpha is at the same end of the alphas throughout.

    B2 at one alpha rises with kappa. Criterion: B2 at the largest imbalance minus that at the smallest, by seed, as a
    mean over the alphas at which no run of either has collapsed, is above 0.
    """
    parts = {f"imbalance {ratio:g}": part for ratio, part in split(runs, IMBALANCE).items()}
    changes = dict(moves(parts, BALANCED))
    outcome = both(*(at_most([-value for value in change], MARGIN) for change in changes.values()))
    text = "; ".join(f"{name} {told(change)}" for name, change in changes.items())
    claim = "E4: the best alpha does not fall with the imbalance"
    verdict = Verdict(claim, judged(runs, parts, BALANCED, outcome), f"{listed(parts, BALANCED)}; {text}")
    low, *_, high = [split(part, ALPHA) for part in parts.values()] * 2
    shared = [alpha for alpha in low if alpha in high and _whole(low[alpha]) and _whole(high[alpha])]
    rises: dict[int, list[float]] = {}
    for alpha in shared:
        for seed in {run.seed for run in low[alpha]} & {run.seed for run in high[alpha]}:
            most, least = ([run for run in part[alpha] if run.seed == seed] for part in (high, low))
            rises.setdefault(seed, []).extend(pairs(most, least, B2))
    values = [mean(part) for part in rises.values() if len(part) == len(shared)]
    words = "; ".join(_shares(name, float(name.split()[1]), part) for name, part in parts.items())
    outcome = above(values) if len(parts) > 1 else above([])
    text = f"{told(values)}, over alphas {', '.join(f'{alpha:g}' for alpha in shared) or 'none'}; {words}"
    return [verdict, Verdict("E4: B2 at one alpha rises with the imbalance", outcome, text)]


def _whole(runs: Runs) -> bool:
    return len(uncollapsed(runs)) == len(runs)


def _shares(name: str, ratio: float, runs: Runs) -> str:
    """The shares of ten classes with this imbalance, and the constant of the bound at the training's temperature."""
    profile = runs[0].settings.get("dataset.imbalance_profile", PROFILES[0])
    counts = class_counts(MANY_IMAGES, CLASSES, ratio, profile)
    share = [count / sum(counts) for count in counts]
    constant = runs[0].numbers[TEMPERATURE] * log(1 / min(share))
    return f"{name}: nu {min(share):.4f}, kappa {sum(p * p for p in share):.3f}, tau log(1/nu) {constant:.2f}"


def draw(runs: Runs) -> Figure:
    """Accuracy against alpha, a line for each imbalance."""
    parts = {f"imbalance {ratio:g}": part for ratio, part in split(runs, IMBALANCE).items()}
    return curves({"": parts}, BALANCED)


JUDGE = Judge(long_tail, axes=(IMBALANCE, ALPHA), needs=(IMBALANCE, ALPHA, TEMPERATURE, BALANCED, B2, NORM), draw=draw)

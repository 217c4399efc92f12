"""What a judge is made of: runs by their settings, the rules by which numbers decide, and a verdict.

A prediction holds if chance is excluded on its side, fails if the estimate is on the other side, and is undecided
otherwise. Seeds are the sample wherever a rule takes values. Intervals are at the level of 95 %.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from scclr.report.runs import Run, axes, shown
from scclr.report.statistics import SIGNIFICANT, Correlation, Range, estimate
from scclr.theory.moments import COLLAPSED

HOLDS, FAILS, UNDECIDED = "HOLDS", "FAILS", "UNDECIDED"
LEAST_SEEDS = 3  # with fewer nothing is decided
PROBE, NCC = "logreg-v1/top1", "z/ncc-v1/top1"
B2, I_B, V_AUG, NORM = (f"theory/z/{name}" for name in ("b2", "i_b", "v_aug", "mean_norm2"))
ALPHA, TEMPERATURE = "alpha", "loss.temperature"

Runs = Sequence[Run]


class Verdict(NamedTuple):
    """What became of a claim, and the numbers that say so."""

    claim: str
    outcome: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.outcome:<9}  {self.claim}\n           {self.numbers}"


@dataclass(frozen=True)
class Judge:
    """One experiment.

    Args:
        rule: the verdicts on some runs; its docstring states command, prediction and criterion.
        axes: what may vary besides the seed; a name that ends in a dot is a group of keys.
        needs: the metrics, and the numbers of the configuration, that every run must have.
        also: further metrics that the table shows.
        measure: the runs with numbers that are not in their ``result.json``.
        draw: a figure.
    """

    rule: Callable[[Runs], list[Verdict]]
    axes: tuple[str, ...]
    needs: tuple[str, ...]
    also: tuple[str, ...] = ()
    measure: Callable[[Runs], list[Run]] = list
    draw: Callable[[Runs], Figure] | None = None


# Runs -----------------------------------------------------------------------------------------------------------------


def split(runs: Runs, axis: str) -> dict[Any, list[Run]]:
    """The runs by their value on an axis, in its order; one that is no number is as one types it."""
    parts: dict[Any, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.numbers.get(axis, shown(run.settings.get(axis))), []).append(run)
    return dict(sorted(parts.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def by_augmentation(runs: Runs) -> dict[str, list[Run]]:
    """The runs by the keys of the augmentation that vary, in words."""
    keys = [key for key in axes(runs) if key.startswith("augment.")]
    parts: dict[str, list[Run]] = {}
    for run in runs:
        words = (f"{key.removeprefix('augment.')}={shown(run.settings.get(key))}" for key in keys)
        parts.setdefault(" ".join(words) or "one augmentation", []).append(run)
    return parts


def by_seed(runs: Runs, metric: str) -> dict[int, float]:
    """A metric of runs that differ in the seed alone."""
    return {run.seed: run.numbers[metric] for run in runs if metric in run.numbers}


def pairs(runs: Runs, others: Runs, metric: str) -> list[float]:
    """A metric minus that of the other run with the same seed."""
    a, b = by_seed(runs, metric), by_seed(others, metric)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def uncollapsed(runs: Runs) -> list[Run]:
    """The runs whose embeddings z are not one point."""
    return [run for run in runs if run.numbers[NORM] <= COLLAPSED]


def seeds(runs: Runs) -> int:
    """How many different seeds they have."""
    return len({run.seed for run in runs})


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    found = list(values)
    return sum(found) / len(found)


# Rules ----------------------------------------------------------------------------------------------------------------


def ends(values: Sequence[float]) -> Range:
    """The interval of the mean; of equal numbers, that number."""
    found = estimate(values)
    return found.interval or (found.mean, found.mean)


def above(values: Sequence[float], least: float = 0.0) -> str:
    """Whether the mean is above ``least``."""
    if len(values) < LEAST_SEEDS:
        return UNDECIDED
    return HOLDS if ends(values)[0] > least else FAILS if mean(values) <= least else UNDECIDED


def at_most(values: Sequence[float], most: float) -> str:
    """Whether the mean is at most ``most``."""
    if len(values) < LEAST_SEEDS:
        return UNDECIDED
    return HOLDS if ends(values)[1] <= most else FAILS if mean(values) > most else UNDECIDED


def within(values: Sequence[float], margin: float) -> str:
    """Whether the mean is at most ``margin`` away from 0."""
    return both(at_most(values, margin), at_most([-value for value in values], margin))


def ordered(found: Correlation | None, sign: int = 1) -> str:
    """Whether a rank correlation has this sign."""
    if found is None:
        return UNDECIDED
    beyond = min(sign * end for end in found.rho_interval) > 0
    return HOLDS if beyond else FAILS if sign * found.rho <= 0 else UNDECIDED


def differs(values: Sequence[float], p: float | None, margin: float) -> str:
    """Whether the mean differs from 0, either way: by a corrected p; it fails if it is surely within ``margin``."""
    if p is not None and p < SIGNIFICANT and len(values) >= LEAST_SEEDS:
        return HOLDS
    return FAILS if within(values, margin) == HOLDS else UNDECIDED


def both(*outcomes: str) -> str:
    """Of a claim with several parts: one that fails is enough to fail it, and it holds if all of them do."""
    if FAILS in outcomes:
        return FAILS
    return HOLDS if outcomes and all(outcome == HOLDS for outcome in outcomes) else UNDECIDED


# Words ----------------------------------------------------------------------------------------------------------------


def told(values: Sequence[float], factor: float = 1.0) -> str:
    """``+0.12 [+0.05, +0.19], 5 seeds``."""
    if not values:
        return "no seeds"
    low, high = ends(values)
    interval = f" [{factor * low:+.3g}, {factor * high:+.3g}]" if len(values) > 1 else ""
    return f"{factor * mean(values):+.3g}{interval}, {len(values)} seeds"


def rank(found: Correlation | None) -> str:
    """``rho = +0.80 [+0.41, +0.95], n = 9``."""
    if found is None:
        return "too few runs, or all the same"
    low, high = found.rho_interval
    return f"rho = {found.rho:+.2f} [{low:+.2f}, {high:+.2f}], n = {found.n}"

"""Means, differences and correlations over seeds, with intervals at the level of 95 %.

Everything here is a function of plain numbers. Intervals are not corrected for their number; p-values are, by ``holm``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
SIGNIFICANT = 0.05
FEW = 10  # numbers; below, a bootstrap interval stands beside that of Student's t
RESAMPLES = 2000
ROUNDING = 1e-12  # a spread that is smaller than this share of the numbers is rounding

Range = tuple[float, float]


class Estimate(NamedTuple):
    """The mean of ``n`` numbers. What one number, or numbers that are all the same, cannot tell is None."""

    n: int
    mean: float
    sd: float | None = None  # with n - 1 in the denominator
    interval: Range | None = None  # of Student's t
    bootstrap: Range | None = None  # BCa (Efron 1987), of few numbers


class Difference(NamedTuple):
    """How far the mean of some numbers is above that of others.

    ``interval`` and ``p`` are None if there is one pair, or if all differences are equal: then nothing tells chance
    from effect.
    """

    n: int  # pairs; if unpaired, numbers in the smaller part
    paired: bool
    value: float
    interval: Range | None = None
    p: float | None = None  # two-sided


class Correlation(NamedTuple):
    """Pearson's r of ``n`` pairs with Fisher's interval, and Spearman's rho with a bootstrap interval."""

    n: int
    r: float
    interval: Range
    rho: float
    rho_interval: Range


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and intervals of one number or more."""
    from scipy import stats

    x, n = np.asarray(values, dtype=float), len(values)
    if n < 2:
        return Estimate(n, float(x.mean()))
    sd = float(x.std(ddof=1))
    if _is_constant(x):
        return Estimate(n, float(x.mean()), sd)
    interval, bootstrap = stats.t.interval(LEVEL, n - 1, x.mean(), sd / math.sqrt(n)), None
    if 2 < n < FEW:
        found = stats.bootstrap(
            (x,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        )
        bootstrap = _range(found.confidence_interval)
    return Estimate(n, float(x.mean()), sd, _range(interval), bootstrap)


def difference(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Scores by seed, minus those of a baseline by seed.

    With two seeds or more in common only these count, in pairs (Student's t). Otherwise it is Welch's t of all.
    """
    from scipy import stats

    common = [seed for seed in scores if seed in baseline]
    if len(common) > 1 or not (len(scores) > 1 and len(baseline) > 1):
        pairs = [(scores[seed], baseline[seed]) for seed in common]
        if not pairs:
            means = [float(np.mean(list(part.values()))) for part in (scores, baseline)]
            return Difference(min(len(scores), len(baseline)), False, means[0] - means[1])
        x, y = np.array(pairs, dtype=float).T
        value = float((x - y).mean())
        if len(pairs) < 2 or _is_constant(x - y, scale=np.abs(x).max()):
            return Difference(len(pairs), True, value)
        test, paired, n = stats.ttest_rel(x, y), True, len(pairs)
    else:
        x, y = (np.array(list(part.values()), dtype=float) for part in (scores, baseline))
        value, paired, n = float(x.mean() - y.mean()), False, min(len(x), len(y))
        if _is_constant(x) and _is_constant(y):
            return Difference(n, False, value)
        test = stats.ttest_ind(x, y, equal_var=False)
    return Difference(n, paired, value, _range(test.confidence_interval(LEVEL)), float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false one below the level is at most that."""
    values, order = np.asarray(p, dtype=float), np.argsort(p)
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(raised, 1)
    return corrected.tolist()


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """The correlations of pairs; None for fewer than four, or where x or y is constant."""
    from scipy import stats

    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 4 or _is_constant(a) or _is_constant(b):
        return None
    pearson = stats.pearsonr(a, b)
    ranks = np.stack([stats.rankdata(a), stats.rankdata(b)])
    drawn = ranks[:, np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))]  # [2, RESAMPLES, n]
    drawn = stats.rankdata(drawn, axis=2)
    centred = drawn - drawn.mean(2, keepdims=True)
    norms = np.sqrt((centred**2).sum(2))  # [2, RESAMPLES]
    varied = (norms > 0).all(0)
    rhos = (centred[0] * centred[1]).sum(1)[varied] / norms[:, varied].prod(0)
    tail = 50 * (1 - LEVEL)
    spread = (float(np.percentile(rhos, tail)), float(np.percentile(rhos, 100 - tail)))
    rho = float(stats.spearmanr(a, b).statistic)
    return Correlation(len(a), float(pearson.statistic), _range(pearson.confidence_interval(LEVEL)), rho, spread)


def _is_constant(x: np.ndarray, scale: float | None = None) -> bool:
    """Whether numbers differ by rounding only.

    Args:
        scale: the size of what they were computed from; None if that is their own.
    """
    return bool(np.ptp(x) <= ROUNDING * (np.abs(x).max() if scale is None else scale))


def _range(ends: Sequence[float]) -> Range:
    low, high = ends
    return float(low), float(high)

"""A report's statistics against SciPy and statsmodels on fixed data, and how often they err on data without effect."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from scclr.report.statistics import correlation, difference, estimate, holm
from scclr.report.study import Study, study

SCORES = {0: 0.912, 1: 0.905, 2: 0.921, 3: 0.917, 4: 0.909}
BASE = {0: 0.901, 1: 0.899, 2: 0.910, 3: 0.903, 4: 0.905}


def test_mean_and_intervals_are_those_of_other_libraries() -> None:
    values = list(SCORES.values())
    found = estimate(values)
    assert (found.n, found.mean, found.sd) == pytest.approx((5, np.mean(values), np.std(values, ddof=1)))
    assert found.interval == pytest.approx(DescrStatsW(values).tconfint_mean(0.05))
    reference = stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(1))
    assert found.bootstrap == pytest.approx(tuple(reference.confidence_interval), abs=3e-4)
    assert estimate(values * 2).bootstrap is None  # ten numbers: enough for t alone


def test_what_cannot_be_told_is_not_said() -> None:
    assert estimate([0.5])[2:] == (None, None, None)
    assert estimate([0.5, 0.5, 0.5]).interval is None
    same = difference({0: 0.914, 1: 0.922}, {0: 0.904, 1: 0.912})  # equal up to rounding
    assert same.value == pytest.approx(0.01)
    assert same.interval is None
    assert same.p is None
    assert difference({0: 0.9}, {0: 0.8})[:3] == (1, True, pytest.approx(0.1))
    assert difference({0: 0.9}, {1: 0.8})[:3] == (1, False, pytest.approx(0.1))


def test_differences_are_paired_by_seed() -> None:
    shuffled = {seed: BASE[seed] for seed in (3, 1, 4, 0, 2)} | {9: 0.1}  # seed 9 has no partner
    found = difference(SCORES, shuffled)
    d = DescrStatsW([SCORES[seed] - BASE[seed] for seed in SCORES])
    assert (found.n, found.paired, found.value) == (5, True, pytest.approx(d.mean))
    assert found.interval == pytest.approx(d.tconfint_mean(0.05))
    assert found.p == pytest.approx(d.ttest_mean(0)[1])


def test_without_common_seeds_it_is_welchs_test() -> None:
    found = difference(SCORES, {seed + 10: value for seed, value in BASE.items()})
    pair = CompareMeans(DescrStatsW(list(SCORES.values())), DescrStatsW(list(BASE.values())))
    assert not found.paired
    assert found.interval == pytest.approx(pair.tconfint_diff(0.05, usevar="unequal"))
    assert found.p == pytest.approx(pair.ttest_ind(usevar="unequal")[1])


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # by hand: 3 x 0.01, 2 x 0.03, at least that
    p = np.random.default_rng(0).uniform(0, 0.2, 9).tolist()
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_correlations() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 0.7 * x + rng.normal(size=12)
    found = correlation(x, y)
    assert found is not None
    pearson, z = stats.pearsonr(x, y).statistic, 1.959964 / math.sqrt(9)
    assert found.r == pytest.approx(pearson)
    assert found.interval == pytest.approx((math.tanh(math.atanh(pearson) - z), math.tanh(math.atanh(pearson) + z)))
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    draws = [rng.integers(0, 12, 12) for _ in range(4000)]
    brute = np.percentile([stats.spearmanr(x[i], y[i]).statistic for i in draws], [2.5, 97.5])
    assert found.rho_interval == pytest.approx(tuple(brute), abs=0.05)
    assert correlation([1, 2, 3, 4], [5, 5, 5, 5]) is None
    assert correlation([1, 2, 3], [1, 2, 3]) is None


def fake_runs(scores: np.ndarray) -> list[Any]:
    """Runs of balances 0.5, 0.6, ... with scores [balances, seeds]."""
    return [
        SimpleNamespace(
            directory=Path("run"), folder="f", group=str(i), seed=seed, settings={"alpha": round(0.5 + i / 10, 1)},
            numbers={"logreg-v1/top1": float(score)}, result={"metrics": {}, "config": {}},
        )
        for i, row in enumerate(scores)
        for seed, score in enumerate(row)
    ]  # fmt: skip


def compared(scores: np.ndarray) -> Study:
    return study(fake_runs(scores), None, None)


@pytest.mark.parametrize("balances", [2, 5])
def test_on_data_without_effect_marks_are_as_rare_as_promised(balances: int) -> None:
    rng, studies = np.random.default_rng(3), 2000
    marked = best = comparisons = uncorrected = 0
    for _ in range(studies):
        seeds = rng.normal(0, 0.01, 5)  # an effect of the seed, which all balances share
        found = compared(0.9 + seeds + rng.normal(0, 0.004, (balances, 5)))
        marked += any(group.mark for group in found.groups)
        best += any(group.best for group in found.groups)
        p = [group.difference.p for group in found.groups if group.difference is not None]
        comparisons, uncorrected = comparisons + len(p), uncorrected + sum(value < 0.05 for value in p)
    assert 0.03 < uncorrected / comparisons < 0.07
    assert marked / studies < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / studies)  # of any in a study; at most 5 % expected
    assert best / studies < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / studies)
    if balances == 2:
        assert 0.03 < marked / studies < 0.07


def test_an_effect_is_marked() -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 5))
    found = compared(np.array([[0.9], [0.93], [0.88]]) + noise)
    assert [group.mark for group in found.groups] == ["", "above", "below"]
    assert [group.best for group in found.groups] == [False, True, False]
    assert [group.is_baseline for group in found.groups] == [True, False, False]
    tied = compared(np.array([[0.9], [0.93], [0.9301]]) + noise)
    assert not any(group.best for group in tied.groups)  # the two above do not differ

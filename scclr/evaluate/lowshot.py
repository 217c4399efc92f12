"""Logistic regression on few labels: n images a class, or a share of the images, drawn several times.

Dimensions: N images, D features, K classes.
"""

import math
import statistics

import numpy as np
import torch
from torch import Tensor

from scclr.config.errors import require
from scclr.datasets import Splits
from scclr.evaluate.features import held
from scclr.evaluate.logreg import choose_l2, fit_logreg, tested
from scclr.evaluate.protocol import Features, Outcome, Protocol, require_grid, require_number

LEVEL = 0.95  # of the confidence interval


class LowShot(Protocol):
    """Multinomial logistic regression, as ``LogReg``, on draws of the training images.

    ``shots5`` has 5 images of each class, ``share0.01`` a hundredth of each class, rounded, but at least one. Each draw
    is a random order of the images, and each size takes the first of every class; so the smaller draws are parts of
    the larger ones. For each draw the whole validation split chooses the L2 strength, as in ``LogReg``; no validation
    image is fitted. ``shots5/top1`` and the other metrics are means over draws. ``shots5/top1_std`` is the standard
    deviation over draws, and ``top1_low`` and ``top1_high`` are the ends of the 95 % interval of the mean by Student's
    t. They tell how much the choice of images matters, not the choice of test images.

    Args:
        shots: images of each class.
        shares: of the images of each class.
        draws: of each size.
        l2, max_iter: as of ``LogReg``.

    Raises:
        ValueError: a value out of range, or no size at all.
    """

    def __init__(self, *, shots: list[int], shares: list[float], draws: int, l2: list[float], max_iter: int) -> None:
        if shots or not shares:
            require_grid("shots", shots, 1, 10**6)
        if shares:
            require_grid("shares", shares, 1e-6, 1)
        require_number("draws", draws, 1, 10**4)
        require_grid("l2", l2, 1e-12, 1e6)
        require_number("max_iter", max_iter, 1, 10**6)
        self.sizes: dict[str, int | float] = {f"shots{n}": n for n in shots}
        self.sizes |= {f"share{share:g}": share for share in shares}
        self.shots, self.draws, self.l2, self.max_iter = shots, draws, l2, max_iter

    def check(self, splits: Splits) -> None:
        """Refuse classes with fewer training images than ``shots``: their draws would not be what the name says."""
        counts = torch.bincount(splits.train.labels, minlength=len(splits.classes)).tolist()
        least = min(counts)
        message = f"shots={self.shots}: class {splits.classes[counts.index(least)]!r} has {least} training images"
        require(least >= max(self.shots, default=0), f"{message}; give at most that many")

    def __call__(self, features: Features) -> Outcome:
        self.check(features.splits)
        labels, device = features.splits.train.labels.cpu(), features.train[1].device
        found: dict[str, list[dict[str, float]]] = {size: [] for size in self.sizes}
        validation, strengths = [], {size: list[float]() for size in self.sizes}
        for draw in range(self.draws):
            order = np.random.default_rng([features.seed, draw]).permutation(len(labels))
            for name, size in self.sizes.items():
                _, own = held(first_of_each(labels, torch.from_numpy(order), size), len(labels))
                part = features.train[0][own.to(device)], features.train[1][own.to(device)]
                choice = choose_l2(part, features.validation, features.classes, self.l2, self.max_iter)
                fit = fit_logreg([part], features.classes, choice.l2, self.max_iter, choice.fit.weights)
                found[name].append(tested(features, fit.weights).metrics(features.splits))
                strengths[name].append(choice.l2)
                validation.append(choice.validation)
        metrics: dict[str, float] = {}
        for name, rows in found.items():
            metrics |= {f"{name}/{metric}": statistics.fmean(row[metric] for row in rows) for metric in rows[0]}
            metrics |= {f"{name}/top1_{end}": value for end, value in spread([row["top1"] for row in rows]).items()}
        chosen = {"l2": strengths}  # of each draw
        return Outcome(metrics, statistics.fmean(validation), chosen)


def first_of_each(labels: Tensor, order: Tensor, size: int | float) -> Tensor:
    """The rows, in rising order, of the first images of each class in ``order``.

    Args:
        labels: int64 [N].
        order: a permutation of the N rows.
        size: this many of each class, if it is a whole number; a share of each class, but at least one, if it is not.
            1.0 is all of them.
    """
    counts = torch.bincount(labels)
    taken = torch.full_like(counts, int(size)) if isinstance(size, int) else (counts * size).round_().clamp_(1).long()
    by_class = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank < taken[labels[by_class]]].sort().values


def spread(values: list[float]) -> dict[str, float]:
    """Standard deviation, and the ends of the 95 % interval of the mean by Student's t; empty of a single value."""
    from scipy import stats

    if len(values) < 2:
        return {}
    deviation = statistics.stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return {"std": deviation, "low": mean - half, "high": mean + half}

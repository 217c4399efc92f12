"""Multinomial logistic regression by L-BFGS, on features that stay where they are: in float32, in parts, and shared out
over processes.

Dimensions: N images, D features, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from scclr.evaluate.protocol import Features, Outcome, Part, Protocol, require_grid, require_number
from scclr.evaluate.scores import Tally
from scclr.run import distributed

BLOCK = {"cpu": 2**20, "cuda": 2**26}  # numbers that are in float64 at once; on a CPU they should fit its cache
CURVATURE_ROWS = 32  # times D: images that the curvature is estimated from
PAIRS = 20  # of preceding steps and gradients that L-BFGS keeps
TO_CHOOSE, TO_TEST = 1e-5, 1e-7  # what a fit may leave to gain of its objective, as ``fit_logreg`` estimates it


class LogReg(Protocol):
    """Multinomial logistic regression on standardized features.

    The L2 strength is chosen on the validation split. Then the model is fitted again on what may be learned from
    (``Features.known``), and tested once.

    Args:
        l2: strengths of the penalty of the mean loss; in scikit-learn's terms 1 / (C N).
        max_iter: at most this many L-BFGS iterations in a fit.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, l2: list[float], max_iter: int) -> None:
        require_grid("l2", l2, 1e-12, 1e6)
        require_number("max_iter", max_iter, 1, 10**6)
        self.l2, self.max_iter = l2, max_iter

    def __call__(self, features: Features) -> Outcome:
        classes = features.classes
        choice = choose_l2(features.train, features.validation, classes, self.l2, self.max_iter)
        fit = fit_logreg(features.known, classes, choice.l2, self.max_iter, choice.fit.weights)
        tally = tested(features, fit.weights)
        chosen = {"l2": choice.l2, "gradient": fit.gradient}
        return Outcome(tally.metrics(features.splits), choice.validation, chosen, tally.confusion)


class Fit(NamedTuple):
    """What ``fit_logreg`` found."""

    weights: Tensor  # float64 [K, D + 1], on features as they are; the bias is the last column
    gradient: float  # the largest entry of the objective's gradient on the weights of standardized features
    iterations: int


class Choice(NamedTuple):
    """What ``choose_l2`` found."""

    l2: float
    validation: float  # the accuracy on the validation images
    fit: Fit


def choose_l2(train: Part, validation: Part, classes: int, l2: Sequence[float], max_iter: int) -> Choice:
    """The L2 strength with the best validation accuracy. Of equally good ones the strongest wins.

    Each fit starts from the one before, from the strongest penalty on, and computes in float32: its tolerance is far
    above the rounding errors.
    """
    found: list[Choice] = []
    for strength in sorted(l2, reverse=True):
        start = found[-1].fit.weights if found else None
        fit = fit_logreg([train], classes, strength, max_iter, start, tolerance=TO_CHOOSE, dtype=torch.float32)
        right = accuracy(predict(validation[0], fit.weights), validation[1])
        found.append(Choice(strength, right, fit))
    return max(found, key=lambda choice: choice.validation)  # the first of equals


def fit_logreg(
    parts: Sequence[Part],
    classes: int,
    l2: float,
    max_iter: int,
    start: Tensor | None = None,
    *,
    tolerance: float = TO_TEST,
    dtype: torch.dtype = torch.float64,
) -> Fit:
    """Minimize ``mean cross-entropy + l2/2 |W|^2`` over the weights W of standardized features, by L-BFGS.

    The bias is not penalized. In scikit-learn's terms l2 is 1 / (C N). The search runs in coordinates in which the
    Hessian at ``start``, averaged over classes, is the identity. The minimum is the same, and it is reached in fewer
    iterations than standardized features need (scripts/results/measured.md).

    Products are in ``dtype``, of one block of images at a time, and sums of blocks in float64. Besides the features,
    memory holds about 50 K D numbers of float64 (L-BFGS, on the CPU), a few D^2, and a block. Several processes hold a
    part each and add up; the result is that of one process, to rounding.

    Args:
        parts: the images of this process. They are not copied.
        start: weights to start from instead of zero.
        tolerance: the search stops where half of the squared gradient in its coordinates falls below ``tolerance``
            times the objective. With a true Hessian this would be what is left to gain.
        dtype: float32 takes half the time of float64, and gives gradients to about six digits.
    """
    objective = Objective.of(parts, l2, dtype)
    weights = objective.standard.new_zeros(classes, len(objective.standard)) if start is None else start
    root = objective.curvature(weights)
    to_raw = torch.linalg.solve_triangular(root, objective.standard, upper=False)
    last = np.zeros(0)

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal last
        value, gradient = objective(torch.from_numpy(point).to(to_raw.device).view(classes, -1) @ to_raw)
        last = (gradient @ to_raw.T).flatten().cpu().numpy()
        return value.item(), last

    def stop_early(intermediate_result: OptimizeResult) -> None:
        if last @ last / 2 <= tolerance * intermediate_result.fun:
            raise StopIteration

    first = (weights @ objective.raw @ root).flatten().cpu().numpy()
    options = {"maxiter": max_iter, "maxcor": PAIRS, "ftol": 0, "gtol": 0, "maxfun": 2 * max_iter}
    found = minimize(evaluate, first, jac=True, method="L-BFGS-B", callback=stop_early, options=options)
    weights = torch.from_numpy(found.x).to(to_raw.device).view(classes, -1) @ to_raw
    gradient = objective(weights)[1] @ objective.standard.T
    return Fit(weights, gradient.abs().max().item(), int(found.nit))


@dataclass(frozen=True)
class Objective:
    """``mean cross-entropy + l2/2 |W|^2`` as a function of the weights of features as they are, [K, D + 1].

    Standardized weights W and bias b act on (x - mean) / std. On x itself they are ``[W, b] @ standard``.
    """

    parts: Sequence[Part]
    l2: float
    images: float  # of all processes
    std: Tensor  # float64 [D]; 0 for a constant feature, whose weight stays 0
    standard: Tensor  # float64 [D + 1, D + 1]
    raw: Tensor  # its inverse
    dtype: torch.dtype  # of products

    @classmethod
    def of(cls, parts: Sequence[Part], l2: float, dtype: torch.dtype = torch.float64) -> "Objective":
        width = parts[0][0].shape[1]
        zero = torch.zeros(width + 1, dtype=torch.float64, device=parts[0][0].device)
        total, square = zero.clone(), zero[:-1].clone()
        for x, _ in blocks(parts, width):
            total[:-1] += x.sum(0)
            total[-1] += len(x)
        distributed.all_reduce_sum(total)
        mean = total[:-1] / total[-1]
        for x, _ in blocks(parts, width):
            square += (x - mean).square_().sum(0)
        std = (distributed.all_reduce_sum(square) / total[-1]).sqrt()
        std = torch.where(std > 1e-12, std, 0.0)
        scale = torch.where(std > 0, 1 / std, 0.0)
        standard, raw = (torch.cat([diagonal, zero[:1] + 1]).diag() for diagonal in (scale, std))
        standard[:-1, -1], raw[:-1, -1] = -mean * scale, mean
        return cls(parts, l2, total[-1].item(), std, standard, raw, dtype)

    def __call__(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The value at ``weights`` [K, D + 1], and its gradient of the same shape."""
        classes, width = weights.shape[0], weights.shape[1] - 1
        sums = weights.new_zeros(classes + 1, width + 1)  # the last row starts with the value
        exact = self.dtype == torch.float64
        mean, scale = self.raw[:-1, -1].to(self.dtype), self.standard.diagonal()[:-1].to(self.dtype)
        used = (weights if exact else weights @ self.raw).to(self.dtype)
        for x, y in blocks(self.parts, width + classes, self.dtype):
            if not exact:  # the sum of large products of opposite sign would cost digits
                x = (x - mean).mul_(scale)
            z = torch.addmm(used[:, -1], x, used[:, :-1].T)  # [n, K]
            label = y.unsqueeze(1)
            log_sum = z.logsumexp(1, keepdim=True)
            sums[-1, 0] += (log_sum - z.gather(1, label)).sum(dtype=torch.float64)
            p = z.sub_(log_sum).exp_()
            p.scatter_add_(1, label, torch.full_like(log_sum, -1.0))
            sums[:-1, :-1] += p.T @ x
            sums[:-1, -1] += p.sum(0)
        if not exact:
            sums[:-1] = sums[:-1] @ self.raw.T
        sums = distributed.all_reduce_sum(sums) / self.images
        penalized = weights[:, :-1] * self.std
        gradient = sums[:-1]
        gradient[:, :-1] += self.l2 * penalized * self.std
        return sums[-1, 0] + self.l2 / 2 * penalized.square().sum(), gradient

    def curvature(self, weights: Tensor) -> Tensor:
        """The Cholesky factor of ``mean(w x x^T) + l2``, [D + 1, D + 1], for standardized x with a 1 at the end.

        Here w is the mean of ``p_k (1 - p_k)`` over classes, of the softmax p at ``weights``. So this is the mean of
        the Hessian's diagonal blocks. It is estimated from a part of the images.
        """
        width = weights.shape[1] - 1
        every = max(1, int(self.images) // (CURVATURE_ROWS * (width + 1)))
        total = torch.zeros_like(self.standard)
        for x, _ in blocks([(x[::every], y[::every]) for x, y in self.parts], width + len(weights)):
            p = torch.addmm(weights[:, -1], x, weights[:, :-1].T).softmax(1)
            weight = (p * (1 - p)).mean(1, keepdim=True)
            ones = torch.ones_like(x[:, :1])
            rows = torch.cat([x, ones], 1) @ self.standard.T
            total.addmm_((rows * weight).T, rows)
        total = distributed.all_reduce_sum(total) * (every / self.images)
        total.diagonal()[:-1].add_(self.l2)
        total.diagonal().add_(1e-9 * total.diagonal().mean())  # constant or repeated features make it singular
        return torch.linalg.cholesky(total)


def blocks(parts: Sequence[Part], width: int, dtype: torch.dtype = torch.float64) -> Iterator[Part]:
    """The images of ``parts`` in ``dtype``, so many at a time that ``width`` numbers for each fit a block."""
    for x, y in parts:
        rows = max(1, BLOCK.get(x.device.type, BLOCK["cuda"]) // width)
        for some, labels in zip(x.split(rows), y.split(rows), strict=True):
            yield some.to(dtype), labels


def tested(features: Features, weights: Tensor) -> Tally:
    """The scores of the test split under ``weights`` [K, D + 1]."""
    tally = Tally(len(weights), weights.device)
    for x, y in blocks([features.test], sum(weights.shape)):
        tally.add(torch.addmm(weights[:, -1], x, weights[:, :-1].T), y)
    return tally


def predict(x: Tensor, weights: Tensor) -> Tensor:
    """The classes int64 [N] with the greatest logits of features x [N, D]."""
    labels = x.new_empty(0, dtype=torch.int64)
    found = (torch.addmm(weights[:, -1], some, weights[:, :-1].T).argmax(1) for some, _ in blocks([(x, x)], x.shape[1]))
    return torch.cat([labels, *found])


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """The share of ``predicted`` [N] that equals ``y`` [N], over the images of all processes."""
    counts = torch.stack([(predicted == y).sum(), torch.tensor(len(y), device=y.device)])
    right, images = distributed.all_reduce_sum(counts).tolist()
    return right / images

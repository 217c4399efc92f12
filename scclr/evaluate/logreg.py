"""Multinomial logistic regression by L-BFGS, on features that are rotated to their principal axes.

Dimensions: N images, D features, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class PrincipalAxes:
    """(x - mean) / std by the statistics of ``x`` [N, D], in float64, rotated to its principal axes.

    A rotation changes neither the penalty nor the fit, and ``fit_logreg`` is fast on uncorrelated features. Constant
    features become 0.
    """

    def __init__(self, x: Tensor) -> None:
        x = x.double()
        self.mean, std = x.mean(0), x.std(0, correction=0)
        self.scale = torch.where(std > 1e-12, 1 / std.clamp_min(1e-12), 0.0)
        standard = (x - self.mean) * self.scale
        self.axes = torch.linalg.eigh(standard.T @ standard / len(x)).eigenvectors  # [D, D]

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) * self.scale) @ self.axes


def choose_l2(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int, l2: Sequence[float], max_iter: int
) -> tuple[float, float]:
    """The L2 strength with the best validation accuracy, and that accuracy. Of equally good ones the strongest wins.

    Args:
        train, validation: features [N, D] and labels [N]. Each fit starts from the one before.
    """
    axes = PrincipalAxes(train[0])
    x, x_validation = axes(train[0]), axes(validation[0])
    best, chosen, fit = -1.0, 0.0, None
    for strength in sorted(l2, reverse=True):
        fit = fit_logreg(x, train[1], classes, strength, max_iter, fit)
        found = accuracy(logits(x_validation, fit).argmax(1), validation[1])
        if found > best:
            best, chosen = found, strength
    return chosen, best


def fit_logreg(x: Tensor, y: Tensor, classes: int, l2: float, max_iter: int, start: Tensor | None = None) -> Tensor:
    """Minimize ``mean cross-entropy + l2/2 |W|^2`` by L-BFGS. The bias, which is the last column, is not penalized.

    The search runs in ``V = W / step`` with ``step = (var(x) / 4 + l2)^-1/2``, which bounds the curvature along each
    feature. The minimum is the same, and with uncorrelated features it takes tens of iterations instead of hundreds.

    Args:
        x: float64 [N, D]; y: int64 [N].
        start: a solution to start from instead of zero.

    Returns:
        Weights [K, D + 1]. In scikit-learn's terms l2 is 1 / (C N).
    """
    step = torch.cat([(x.var(0, correction=0) / 4 + l2).rsqrt(), x.new_ones(1)])  # [D + 1]
    scaled = torch.zeros(classes, len(step), dtype=x.dtype, device=x.device) if start is None else start / step
    scaled.requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weights = scaled * step
        value = F.cross_entropy(logits(x, weights), y) + l2 / 2 * weights[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(objective)
    return (scaled * step).detach()


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """x [N, D] by ``weights`` [K, D + 1], [N, K]."""
    return F.linear(x, weights[:, :-1], weights[:, -1])


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """The share of ``predicted`` [N] that equals ``y`` [N]."""
    return (predicted == y).double().mean().item()

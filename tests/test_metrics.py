"""Metrics against naive transcriptions."""

import math

import torch
import torch.nn.functional as F

from scclr import metrics
from scclr.losses.balanced import BalancedLoss


def unit(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_alignment_and_uniformity() -> None:
    a, b = unit(9, 4), unit(9, 4, 1)
    assert math.isclose(
        metrics.alignment(a, b).item(), sum(((x - y) ** 2).sum().item() for x, y in zip(a, b, strict=True)) / 9
    )
    c = unit(9, 4, 2)
    three = [metrics.alignment(*pair).item() for pair in ((a, b), (a, c), (b, c))]
    assert math.isclose(metrics.alignment(a, b, c).item(), sum(three) / 3)
    pairs = [math.exp(-2 * ((a[i] - a[j]) ** 2).sum().item()) for i in range(9) for j in range(9) if i != j]
    assert math.isclose(metrics.uniformity(a).item(), math.log(sum(pairs) / len(pairs)))
    assert metrics.uniformity(a[:1].repeat(5, 1)).item() == 0


def test_effective_rank() -> None:
    assert math.isclose(metrics.effective_rank(torch.eye(6)).item(), 6, rel_tol=1e-6)
    assert math.isclose(metrics.effective_rank(torch.ones(5, 3)).item(), 1, rel_tol=1e-4)


def test_pull_is_the_tangent_gradient() -> None:
    z1, z2 = unit(6, 3), unit(6, 3, 1)
    loss = BalancedLoss(alpha=0.5, temperature=0.5)
    raw = torch.cat([z1, z2]).requires_grad_()
    # the gradient through the normalisation of unit rows is the tangent part
    (expected,) = torch.autograd.grad(loss(*F.normalize(raw, dim=1).chunk(2)).repel, raw)
    with torch.no_grad():
        _, value = metrics.pulls(lambda z: loss(*z)[1:], torch.stack([z1, z2]))
    torch.testing.assert_close(value.flatten(0, 1), expected)

"""NT-Xent and the balanced loss against cross-entropy and closed forms, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.losses.balanced import BalancedLoss
from scclr.losses.ntxent import NTXentLoss

ALPHAS = [0.0, 0.2, 0.5, 0.7, 1.0]
TEMPERATURES = [0.05, 0.5, 2.0]


def embeddings(n: int = 7, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = F.normalize(z, dim=2)
    return first, second


def softmax_pairs(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(p [2N, 2N] with p_ii = 0, positive index [2N])."""
    n = len(z) // 2
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return logits.softmax(1), (torch.arange(2 * n) + n) % (2 * n)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_half_is_cross_entropy_of_the_positive(temperature: float) -> None:
    z1, z2 = embeddings()
    z = torch.cat([z1, z2]).requires_grad_()
    _, positive = softmax_pairs(z.detach(), temperature)
    mask = torch.eye(len(z), dtype=torch.bool)
    expected = F.cross_entropy((z @ z.T / temperature).masked_fill(mask, -math.inf), positive)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    for loss in (NTXentLoss(temperature=temperature), BalancedLoss(alpha=0.5, temperature=temperature)):
        total = loss(*z.chunk(2)).total
        (gradient,) = torch.autograd.grad(total, z)
        assert abs(total - expected).item() <= 1e-12 * max(1, expected.item())
        assert (gradient - expected_gradient).abs().max() <= 1e-12
    assert expected >= 0


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_the_closed_form(alpha: float, temperature: float) -> None:
    """dL/ds_ip = (2/tau) ((1 - alpha) p+ - alpha) / 2N and dL/ds_ik = (2/tau) (1 - alpha) p_ik / 2N."""
    z = torch.cat(embeddings()).requires_grad_()
    (gradient,) = torch.autograd.grad(BalancedLoss(alpha=alpha, temperature=temperature)(*z.chunk(2)).total, z)
    z = z.detach()
    p, positive = softmax_pairs(z, temperature)
    g = (1 - alpha) * p
    g[torch.arange(len(z)), positive] -= alpha
    g *= 2 / (temperature * len(z))
    assert (gradient - (g + g.T) @ z).abs().max() <= 1e-12 / temperature
    rows = (g.sum(1) - 2 / temperature * (1 - 2 * alpha) / len(z)).abs().max()
    assert rows <= 1e-12 / temperature, "force balance: row sums"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_total_is_affine_in_alpha(alpha: float) -> None:
    terms = BalancedLoss(alpha=alpha, temperature=0.5)(*embeddings())
    at_zero, at_one = (BalancedLoss(alpha=a, temperature=0.5)(*embeddings()).total for a in (0.0, 1.0))
    torch.testing.assert_close(terms.total, 2 * (alpha * terms.attract + (1 - alpha) * terms.repel))
    torch.testing.assert_close(terms.total, alpha * at_one + (1 - alpha) * at_zero)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_collapse_and_orthogonal_values(alpha: float) -> None:
    n, temperature = 6, 0.3
    loss = BalancedLoss(alpha=alpha, temperature=temperature)
    same = F.normalize(torch.ones(n, 4, dtype=torch.float64), dim=1).requires_grad_()
    value = loss(same, same).total
    assert math.isclose(
        value.item(), 2 * ((1 - 2 * alpha) / temperature + (1 - alpha) * math.log(2 * n - 1)), abs_tol=1e-12
    )
    (gradient,) = torch.autograd.grad(value, same)
    tangent = gradient - (gradient * same).sum(1, keepdim=True) * same
    assert tangent.abs().max() <= 1e-12
    apart = torch.eye(n, dtype=torch.float64)
    expected = 2 * (-alpha / temperature + (1 - alpha) * math.log(math.exp(1 / temperature) + 2 * n - 2))
    assert math.isclose(loss(apart, apart).total.item(), expected, abs_tol=1e-12)


def test_symmetries() -> None:
    z1, z2 = embeddings()
    loss = BalancedLoss(alpha=0.3, temperature=0.2)
    base = loss(z1, z2).total
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    swap = torch.arange(len(z1)) % 2 == 0
    swapped = torch.where(swap[:, None], z2, z1), torch.where(swap[:, None], z1, z2)
    for other in ((z1[order], z2[order]), (z2, z1), (z1 @ rotation, z2 @ rotation), swapped):
        torch.testing.assert_close(loss(*other).total, base, rtol=1e-13, atol=1e-13)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    z1, z2 = embeddings(64, 32)
    for dtype in (torch.bfloat16, torch.float16):
        low = z1.to(dtype), z2.to(dtype)
        terms = BalancedLoss(alpha=0.4, temperature=0.01)(*low)
        exact = BalancedLoss(alpha=0.4, temperature=0.01)(*(z.double() for z in low))
        assert all(term.dtype == torch.float32 for term in terms)
        torch.testing.assert_close(torch.stack(terms).double(), torch.stack(exact), rtol=1e-6, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = BalancedLoss(alpha=0.4, temperature=0.01)(z1.float(), z2.float()).total
    torch.testing.assert_close(inside, BalancedLoss(alpha=0.4, temperature=0.01)(z1.float(), z2.float()).total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.1, "temperature": 0.5}, "alpha=1.1"),
        ({"alpha": float("nan"), "temperature": 0.5}, "alpha=nan"),
        ({"alpha": 0.5, "temperature": 0.0}, "temperature=0"),
        ({"alpha": 0.5, "temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedLoss(**arguments)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        NTXentLoss(temperature=0.5)(torch.zeros(3, 2), torch.zeros(4, 2))

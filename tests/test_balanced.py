"""The balanced loss against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import alphas, close, few, gradient, seeds, temperatures, unit_views
from references import balanced as closed_form
from torch import Tensor

from scclr.losses.balanced import BalancedLoss
from scclr.losses.ntxent import NTXentLoss


def balanced(alpha: float, temperature: float, views: list[Tensor], **options) -> Tensor:
    return BalancedLoss(alpha=alpha, temperature=temperature, **options)(*views).total


@few
@given(temperature=temperatures, seed=seeds)
def test_alpha_of_one_half_is_cross_entropy_and_ntxent(temperature, seed):
    views = unit_views(seed)
    close(balanced(0.5, temperature, views), closed_form.cross_entropy(views, temperature))
    assert BalancedLoss(alpha=0.5, temperature=0.2)(*views) == NTXentLoss(temperature=0.2)(*views)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("noise", [0.3, 0.9])
def test_float32_is_accurate(temperature, alpha, noise, monkeypatch):
    """Also where positives are easy, so that NT-Xent is many orders of magnitude smaller than A and R."""
    monkeypatch.setattr("scclr.losses.pairs.tile_of", lambda device: 100)
    views = [view.float() for view in unit_views(0, images=151, width=32, noise=noise)]
    loss, wide = BalancedLoss(alpha=alpha, temperature=temperature), [view.double() for view in views]
    tolerance = 1e-6 if temperature >= 0.1 else 5e-5  # an exponential of float32 / temperature
    for found, exact in zip(loss(*views), loss(*wide), strict=True):
        assert abs(found - exact) <= tolerance * abs(exact)
    expected = gradient(lambda *v: loss(*v).total, wide)
    error = gradient(lambda *v: loss(*v).total, views) - expected
    assert error.norm() <= (1e-5 if temperature >= 0.1 else 1e-4) * expected.norm()


@few
@given(temperature=temperatures, seed=seeds, alpha=alphas)
def test_gradient_is_the_closed_form_and_the_finite_difference(temperature, seed, alpha):
    views = unit_views(seed)
    leaves = [view.clone().requires_grad_() for view in views]
    found = torch.cat(torch.autograd.grad(balanced(alpha, temperature, leaves), leaves))
    close(found, closed_form.gradient(views, temperature, alpha))
    by_similarity = closed_form.similarity_gradient(torch.cat(views) @ torch.cat(views).T, temperature, alpha)
    close(by_similarity.sum(1), [2 / temperature * (1 - 2 * alpha) / 10] * 10)

    direction, step = torch.randn(10, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1e-5
    ahead, behind = (
        balanced(alpha, temperature, list((torch.cat(views) + s * direction).chunk(2))) for s in (step, -step)
    )
    slope = (found * direction).sum()
    assert abs((ahead - behind) / (2 * step) - slope) <= 1e-7 * (1 + abs(slope))


@few
@given(temperature=temperatures, alpha=alphas, images=st.integers(1, 9))
def test_collapsed_embeddings_have_a_known_loss_and_no_gradient(temperature, alpha, images):
    views = [F.normalize(torch.ones(images, 3, dtype=torch.float64), dim=1)] * 2
    expected = 2 * ((1 - 2 * alpha) / temperature + (1 - alpha) * math.log(2 * images - 1))
    close(balanced(alpha, temperature, views), expected)
    assert gradient(lambda *v: balanced(alpha, temperature, list(v)), views).abs().max() <= 1e-13


@few
@given(temperature=temperatures, alpha=st.floats(0.02, 1), images=st.integers(2, 6), seed=seeds, noise=st.floats(0, 2))
def test_no_embeddings_are_below_the_minimum(temperature, alpha, images, seed, noise):
    least, _ = closed_form.minimum(images, alpha, temperature)
    assert balanced(alpha, temperature, unit_views(seed, images, noise=noise)) >= least - 1e-12
    if alpha >= 0.5:
        simplex = F.normalize(torch.eye(images, dtype=torch.float64) - 1 / images, dim=1)
        close(balanced(alpha, temperature, [simplex, simplex]), least)


@pytest.mark.parametrize(
    ("alpha", "temperature", "similarity"), [(0.2, 0.5, 0.76949), (0.1, 0.2, 0.13046), (0.6, 0.5, 1.0)]
)
def test_free_embeddings_reach_the_minimum(alpha, temperature, similarity):
    least, a = closed_form.minimum(8, alpha, temperature)
    assert a == pytest.approx(similarity, abs=5e-6)
    free = torch.stack(unit_views(0, images=8, width=20)).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        total = balanced(alpha, temperature, list(F.normalize(free, dim=2)))
        total.backward()
        return total

    optimizer.step(closure)
    views = F.normalize(free.detach(), dim=2)
    close(balanced(alpha, temperature, list(views)), least, 1e-5)
    assert (views[0] * views[1]).sum(1).mean() == pytest.approx(a, abs=1e-3)


@few
@given(temperature=temperatures, alpha=st.floats(0.01, 1), seed=seeds)
def test_lambda_of_the_paper_is_the_same_balance(temperature, alpha, seed):
    """tau (loss - 2 (1 - alpha) log(2B - 1)) / (2 alpha) = -E s_p + lambda tau log mean exp(s / tau)."""
    views = unit_views(seed)
    ratio = (1 - alpha) / alpha
    z = torch.cat(views)
    mean = ((z @ z.T / temperature).fill_diagonal_(-math.inf).logsumexp(1) - math.log(9)).mean()
    paper = -(views[0] * views[1]).sum(1).mean() + ratio * temperature * mean
    total = balanced(alpha, temperature, views)
    close(temperature * (total - 2 * (1 - alpha) * math.log(9)) / (2 * alpha), paper, 1e-11)


def test_dot_similarity_takes_rows_of_any_length():
    views = [3 * view for view in unit_views(0)]
    close(balanced(0.5, 0.1, views, similarity="dot"), closed_form.cross_entropy(views, 0.1))
    with pytest.raises(ValueError, match=r"similarity=dot has no minimum at alpha=0.6: .* type alpha=0.5, or"):
        BalancedLoss(alpha=0.6, temperature=0.5, similarity="dot")


def test_dot_similarity_is_refused_because_the_loss_has_no_minimum():
    """It falls without bound for growing constant embeddings at alpha > 1/2, and for a growing simplex below."""
    simplex = F.normalize(torch.eye(6, dtype=torch.float64) - 1 / 6, dim=1)
    constant = F.normalize(torch.ones(6, 6, dtype=torch.float64), dim=1)
    for alpha, rows in ((0.6, constant), (0.4, simplex)):
        totals = [
            2 * (alpha * t.attract + (1 - alpha) * t.repel)
            for length in (10, 100, 1000)
            for t in [BalancedLoss(alpha=0.5, temperature=1.0, similarity="dot")(*(length * rows).chunk(2))]
        ]
        assert totals[0] > totals[1] > totals[2]
        assert totals[2] < -1e4


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds, count=st.integers(2, 3))
def test_constant_force_rescales_each_anchor_to_ntxent(alpha, temperature, seed, count):
    """sum_k |d total_i / d s_ik| is that of NT-Xent for every anchor i."""
    views = unit_views(seed, count=count)
    z = torch.cat(views)
    image = torch.arange(5).repeat(count)
    positive = (image.unsqueeze(0) == image.unsqueeze(1)).double() - torch.eye(len(z))
    p = (z @ z.T / temperature).fill_diagonal_(-math.inf).softmax(1)

    def forces(a: float) -> Tensor:  # d total_i / d s_ik, divided by 2 / tau
        return (1 - a) * p - a * positive / (count - 1)

    factors = forces(0.5).abs().sum(1) / forces(alpha).abs().sum(1)
    s = forces(alpha) * factors.unsqueeze(1) * 2 / temperature / len(z)
    expected = ((s + s.T) @ z).view(count, 5, 4)
    expected = expected - (expected * torch.stack(views)).sum(2, keepdim=True) * torch.stack(views)
    found = gradient(lambda *v: balanced(alpha, temperature, list(v), rescale="constant_force"), views)
    close(found, expected, 1e-11)
    half = BalancedLoss(alpha=0.5, temperature=temperature, rescale="constant_force")(*views)
    close(half.total, NTXentLoss(temperature=temperature)(*views).total)

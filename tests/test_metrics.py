"""Metrics of a batch against naive computations."""

import math
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from scclr.evaluate.quality import entropy_rank
from scclr.losses.align_uniform import AlignUniformLoss
from scclr.losses.balanced import BalancedLoss
from scclr.pretrain import metrics


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
    assert math.isclose(
        metrics.uniformity(a, b).item(), (metrics.uniformity(a).item() + metrics.uniformity(b).item()) / 2
    )


@pytest.mark.parametrize(("images", "pooled"), [(32, 0.50), (256, 0.08)])
def test_the_logged_uniformity_is_that_of_each_view(images: int, pooled: float) -> None:
    """Pairs of both views together contain positives, which raise it. It equals the loss of Wang & Isola at t = 2."""
    z = unit(images, 32)
    views = torch.stack([z, z])
    found = metrics.embedding_metrics(BalancedLoss(alpha=0.5, temperature=0.5), views, torch.arange(images) % 2)
    wang_isola = AlignUniformLoss(alpha=0.5, t=2.0)(*views).repel.item()
    assert found["uniformity"] == pytest.approx(wang_isola, abs=1e-12)
    assert metrics.uniformity(views.flatten(0, 1)).item() - wang_isola == pytest.approx(pooled, abs=0.2 * pooled)


def test_effective_rank() -> None:
    assert math.isclose(metrics.effective_rank(torch.eye(6)).item(), 6, rel_tol=1e-6)
    assert math.isclose(metrics.effective_rank(torch.ones(5, 3)).item(), 1, rel_tol=1e-4)
    share = [0.6, 0.3, 0.1]
    entropy = -sum(p * math.log(p) for p in share)
    rank = metrics.effective_rank(torch.diag(7 * torch.tensor(share)))
    assert math.isclose(rank.item(), math.exp(entropy), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "dim", "rank"), [(500, 64, 64), (500, 64, 3), (500, 64, 1), (20, 64, 20), (64, 64, 40)])
def test_effective_rank_is_that_of_the_singular_values(n: int, dim: int, rank: int, dtype: torch.dtype) -> None:
    """The singular values span four orders of magnitude, and those beyond ``rank`` are rounding."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -4, rank, dtype=torch.float64)
    left, right = (torch.randn(size, rank, generator=draw, dtype=torch.float64) for size in (n, dim))
    z = F.normalize(left * scales @ right.T, dim=1).to(dtype)
    expected = entropy_rank(torch.linalg.svdvals(z.double())).item()
    assert metrics.effective_rank(z).item() == pytest.approx(expected, rel=1e-5)


def test_a_large_batch_is_measured_by_its_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = torch.stack([unit(50, 4), unit(50, 4, 1)]), torch.arange(50) % 2
    loss = BalancedLoss(alpha=0.5, temperature=0.5)
    few = metrics.embedding_metrics(loss, z[:, :8], labels[:8])
    assert metrics.embedding_metrics(loss, z, labels) != few
    monkeypatch.setattr(metrics, "MEASURED_VIEWS", 16)
    assert metrics.embedding_metrics(loss, z, labels) == few


def test_tangent_gradients_are_the_gradients_through_normalization() -> None:
    z1, z2 = unit(6, 3), unit(6, 3, 1)
    loss = BalancedLoss(alpha=0.5, temperature=0.5)
    raw = torch.cat([z1, z2]).requires_grad_()
    terms = loss(*F.normalize(raw, dim=1).chunk(2))
    expected = [torch.autograd.grad(term, raw, retain_graph=True)[0] for term in (terms.attract, terms.repel)]
    with torch.no_grad():
        found = metrics.tangent_gradients(lambda z: loss(*z)[1:], torch.stack([z1, z2]))
    for gradient, through_normalization in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.flatten(0, 1), through_normalization)


@pytest.mark.parametrize("decoupled", [False, True])
def test_admission_agrees_with_a_naive_computation(decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SOFTMAX_ROWS", 5)
    images, alpha, tau, labels = 7, 0.3, 0.4, [0, 1, 1, 0, 1, 0, 0]
    views = F.normalize(unit(images, 4) + 0.7 * torch.stack([unit(images, 4, seed) for seed in (1, 2, 3)]), dim=2)
    rows = views.flatten(0, 1)  # [21, 4]
    found = metrics.admission_threshold(views, tau, alpha, labels=torch.tensor(labels), decoupled=decoupled)
    numerator, mass, repelled, same = [], [], [], []
    for i in range(len(rows)):
        positives = [k for k in range(len(rows)) if k != i and k % images == i % images]
        negatives = [k for k in range(len(rows)) if k % images != i % images]
        keys = negatives if decoupled else negatives + positives
        softmax = torch.stack([rows[i] @ rows[k] / tau for k in keys]).softmax(0).tolist()
        p = dict(zip(keys, softmax, strict=True))
        attraction = sum((rows[i] @ rows[k]).item() for k in positives) / 2
        numerator.append(alpha * attraction - (1 - alpha) * sum(x * (rows[i] @ rows[k]).item() for k, x in p.items()))
        mass.append(sum(p.get(k, 0) for k in positives))
        repelled += [p.get(k, 0) > alpha / (1 - alpha) / 2 for k in positives]
        own_class = [p[k] for k in negatives if labels[k % images] == labels[i % images]]
        same.append(sum(own_class) / sum(p[k] for k in negatives))
    assert found.p_positive.item() == pytest.approx(mean(mass), rel=1e-12)
    assert found.repelled.item() == pytest.approx(mean(repelled))
    assert found.q_same.item() == pytest.approx(mean(same), rel=1e-12)
    assert found.r_star.item() == pytest.approx(mean(numerator) / (alpha - (1 - alpha) * mean(mass)), rel=1e-12)


def test_embedding_metrics_contain_what_is_finite() -> None:
    z, labels = torch.stack([unit(6, 3), unit(6, 3, 1)]), torch.arange(6) % 2
    loss = BalancedLoss(alpha=0.5, temperature=0.5)
    found = metrics.embedding_metrics(loss, z, labels)
    assert found["alpha"] == 0.5
    assert found["alignment"] == pytest.approx(metrics.alignment(*z).item())
    attract, repel = metrics.tangent_gradients(lambda views: loss(*views)[1:], z)
    cosine = (attract * repel).sum() / attract.norm() / repel.norm()
    assert found["gradient/attract"] == pytest.approx(attract.norm().item())
    assert found["gradient/cosine"] == pytest.approx(cosine.item())
    admission = metrics.admission_threshold(z, 0.5, 0.5, labels=labels)._asdict()
    for name, value in admission.items():
        assert found[f"admission/{name}"] == pytest.approx(value.item())
    without_labels = metrics.embedding_metrics(loss, z, labels - 1)
    assert found.keys() - without_labels.keys() == {"admission/q_same"}
    other_form = metrics.embedding_metrics(AlignUniformLoss(alpha=0.5, t=2.0), z, labels)
    assert found.keys() - other_form.keys() == {f"admission/{name}" for name in admission}

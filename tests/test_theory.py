"""The theory against closed forms, naive transcriptions and whole populations, in float64."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scclr import theory
from scclr.losses import LogSumExpForm
from scclr.losses.balanced import BalancedLoss
from scclr.pretrain.metrics import admission_threshold
from scclr.theory.bound import GAPS
from scclr.theory.moments import influence
from scclr.theory.pairs import certified_mean, jackknife
from scclr.theory.sample import Sample
from scclr.theory.thresholds import edges


def blobs(classes: int, images: int, views: int, d: int, seed: int = 0, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Unit embeddings around images around classes, and labels; every other class has ``images`` + 1 images."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((images + c % 2,), c) for c in range(classes)])
    labels = labels[torch.randperm(len(labels), generator=draw)]
    sizes = (classes, 1, d), (len(labels), 1, d), (len(labels), views, d)
    centre, image, view = (torch.randn(*size, dtype=torch.float64, generator=draw) for size in sizes)
    return F.normalize(centre[labels] + noise * image + noise * view, dim=2), labels


def blobs_of(least: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """``blobs`` with ``least`` or more images in a class and views of an image."""
    few, noises = st.integers(least, least + 2), st.sampled_from([0.0, 0.3, 1.0, 5.0])
    return st.builds(blobs, st.integers(2, 4), few, few, st.integers(1, 4), st.integers(0, 10**6), noises)


populations, samples = blobs_of(1), blobs_of(2)


def values(found: Any) -> Tensor:
    """Every estimate of a result, in order."""
    parts = [x for x in vars(found).values() if isinstance(x, theory.Estimate)]
    return torch.tensor([[x.value, x.se] for x in parts], dtype=torch.float64)


# --- the bias


def test_the_bias_is_a_mean_of_products_of_different_views_and_images() -> None:
    z, labels = blobs(3, 4, 3, 5)
    n, m, _ = z.shape
    between = [(z[i, k] @ z[i, j]).item() for i in range(n) for k, j in itertools.permutations(range(m), 2)]
    a = sum(between) / len(between)
    rows = range(n)
    product = {(i, j): (z[i].mean(0) @ z[j].mean(0)).item() for i in rows for j in rows}
    b = 0.0
    for c in range(3):
        pairs = [product[i, j] for i, j in itertools.permutations(rows, 2) if labels[i] == labels[j] == c]
        b += (labels == c).double().mean().item() * sum(pairs) / len(pairs)
    g = sum(product[i, j] for i, j in itertools.permutations(rows, 2)) / (n * (n - 1))
    found = theory.prototype_bias(z, labels)
    for estimate, expected in ((found.b2, a - b), (found.s_b, b - g), (found.mean_norm2, g), (found.v_aug, 1 - a)):
        assert math.isclose(estimate.value, expected, rel_tol=0, abs_tol=1e-14)
    assert math.isclose(found.i_b.value, (a - b) / (a - g), rel_tol=1e-12)
    for c in range(3):  # as in an analysis of variance: between images, minus what the views contribute
        mine = z[labels == c]
        variance = mine.mean(1).var(0).sum()
        v_aug = mine.var(1).sum(1).mean()
        assert math.isclose(found.by_class[c].value, (variance - v_aug / m).item(), abs_tol=1e-14)


def test_the_bias_is_the_mean_of_its_influence() -> None:
    z, labels = blobs(3, 5, 4, 6)
    per_image = influence(Sample(z, labels, population=False))  # on a, b, g
    found = theory.prototype_bias(z, labels)
    for weights, estimate in (((1, -1, 0), found.b2), ((0, 1, -1), found.s_b), ((0, 0, 1), found.mean_norm2)):
        h = per_image @ torch.tensor(weights, dtype=torch.float64)
        assert math.isclose(h.mean().item(), estimate.value, abs_tol=1e-12)
        assert math.isclose(h.std().item() / len(h) ** 0.5, estimate.se, rel_tol=1e-9)
    step = 1e-6  # the standard error of the ratio, by finite differences
    a, b, g = per_image.mean(0).tolist()
    ratio = lambda a, b, g: (a - b) / (a - g)  # noqa: E731
    at = ratio(a, b, g)
    slope = torch.tensor([ratio(a + step, b, g) - at, ratio(a, b + step, g) - at, ratio(a, b, g + step) - at]) / step
    assert math.isclose((per_image @ slope.double()).std().item() / len(z) ** 0.5, found.i_b.se, rel_tol=1e-4)


@given(samples)
@settings(max_examples=25, deadline=None)
def test_the_parts_sum_to_one_and_are_invariant(sample: tuple[Tensor, Tensor]) -> None:
    z, labels = sample
    found = theory.prototype_bias(z, labels)
    parts = (found.mean_norm2, found.s_b, found.b2, found.v_aug)
    assert math.isclose(sum(part.value for part in parts), 1, abs_tol=1e-12)
    draw = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(z.shape[2], z.shape[2], dtype=torch.float64, generator=draw))[0]
    order, views = torch.randperm(len(z), generator=draw), torch.randperm(z.shape[1], generator=draw)
    moved = theory.prototype_bias((z @ rotation)[order][:, views], (labels.max() - labels)[order])
    for one, other in zip(parts, (moved.mean_norm2, moved.s_b, moved.b2, moved.v_aug), strict=True):
        assert math.isclose(one.value, other.value, abs_tol=1e-12)
        assert math.isclose(one.se, other.se, abs_tol=1e-7)


def test_the_bias_of_identical_views_or_images() -> None:
    z, labels = blobs(3, 4, 1, 5)
    doubled = theory.prototype_bias(z.repeat(1, 3, 1), labels)
    assert abs(doubled.v_aug.value) < 1e-14
    assert doubled.b2.value > 0.1
    one = torch.stack([z[labels == c][0] for c in range(3)])[labels]
    assert abs(theory.prototype_bias(one.repeat(1, 2, 1), labels).b2.value) < 1e-14
    collapsed = theory.prototype_bias(z[:1].repeat(len(z), 2, 1), labels)
    assert collapsed.mean_norm2.value == pytest.approx(1)
    assert math.isnan(collapsed.i_b.value)


def draw(z: Tensor, labels: Tensor, images: int, views: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and views drawn with replacement from a population in which all are equally probable."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(z), (images,), generator=random)
    view = torch.randint(z.shape[1], (images, views), generator=random)
    return z[chosen.unsqueeze(1), view], labels[chosen]


@pytest.mark.parametrize("views", [2, 8])
def test_the_estimates_are_unbiased_and_their_standard_errors_correct(views: int) -> None:
    z, labels = blobs(4, 30, 20, 6, noise=1.0)
    truth = theory.prototype_bias(z, labels, population=True)
    found = [theory.prototype_bias(*draw(z, labels, 120, views, seed)) for seed in range(250)]
    for name in ("b2", "v_aug", "s_b", "mean_norm2"):
        mean = torch.tensor([getattr(one, name).value for one in found], dtype=torch.float64)
        standard_error = mean.std().item() / len(mean) ** 0.5
        assert abs(mean.mean().item() - getattr(truth, name).value) < 3 * standard_error, name
        claimed = sum(getattr(one, name).se ** 2 for one in found) / len(found)
        assert 0.8 < claimed**0.5 / mean.std().item() < 1.2, name
    plug_in = [theory.prototype_bias(*draw(z, labels, 120, views, seed), population=True).b2.value for seed in range(9)]
    assert min(plug_in) > truth.b2.value + 3 * standard_error
    b1 = torch.tensor([one.b1.value for one in found])
    if views == 8:
        assert abs(b1.mean().item() - truth.b1.value) < 0.01


def test_shares_that_are_fixed_move_the_variance_between_classes_by_a_known_bias() -> None:
    """S_B is too large and |mu|^2 too small, by S_B / (n - 1). All draws of two images of each class are enumerated."""
    z, labels = blobs(3, 3, 1, 2)
    members = [z[labels == c][:3] for c in range(3)]  # three equally probable images of each class
    truth = theory.prototype_bias(torch.cat(members), torch.arange(3).repeat_interleave(3), population=True)
    index = [list(images) for images in itertools.product(range(3), repeat=2)]
    found = []
    for chosen in itertools.product(index, repeat=3):
        drawn = torch.cat([one[images] for one, images in zip(members, chosen, strict=True)])
        found.append(Sample(drawn.repeat(1, 2, 1), torch.arange(3).repeat_interleave(2), population=False).moments())
    s_b = sum((one.share @ one.b - one.g).item() for one in found) / len(found)
    mean_norm2 = sum(one.g.item() for one in found) / len(found)
    bias = truth.s_b.value / (6 - 1)
    assert math.isclose(s_b, truth.s_b.value + bias, rel_tol=1e-12)
    assert math.isclose(mean_norm2, truth.mean_norm2.value - bias, rel_tol=1e-12, abs_tol=1e-14)


@given(populations)
@settings(max_examples=40, deadline=None)
def test_attraction_differs_by_the_bias_exactly(population: tuple[Tensor, Tensor]) -> None:
    z, labels = population
    found = theory.prototype_bias(z, labels, population=True)
    objective = theory.supervised_objective(z, labels, 1.0, population=True)
    assert math.isclose(objective.attract.value + 1 - found.v_aug.value, found.b2.value, abs_tol=1e-12)  # T1
    assert found.b2.value - 1e-12 <= found.b1.value <= math.sqrt(max(0, found.b2.value)) + 1e-7
    prototype = torch.stack([z[labels == c].mean((0, 1)) for c in range(int(labels.max()) + 1)])
    by_hand = (z.mean(1) - prototype[labels]).square().sum(1).mean().item()
    assert math.isclose(found.b2.value, by_hand, abs_tol=1e-12)
    coarser = labels.clamp(max=int(labels.max()) - 1)  # merges the last two classes
    merged = theory.prototype_bias(z, coarser, population=True)
    p, q = ((labels == labels.max() - k).double().mean() for k in (0, 1))
    added = p * q / (p + q) * (prototype[-1] - prototype[-2]).square().sum()
    assert math.isclose(merged.b2.value, found.b2.value + added.item(), abs_tol=1e-12)


# --- the bound


@given(populations, st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.sampled_from([0.25, 1.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_the_bounds_hold_on_every_population(population: tuple[Tensor, Tensor], tau: float, lam: float) -> None:
    check_bound(*population, tau, lam, population=True)


@given(samples, st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.sampled_from([0.25, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_the_bounds_hold_on_every_sample(sample: tuple[Tensor, Tensor], tau: float, lam: float) -> None:
    check_bound(*sample, tau, lam, population=False)


def check_bound(z: Tensor, labels: Tensor, tau: float, lam: float, *, population: bool) -> None:
    (found,) = theory.bound(z, labels, [tau], lam, population=population)
    gaps = [getattr(found, name).value for name in GAPS]
    slacks = found.slack.value, found.class_excluded_slack.value, found.cosine_prototypes_slack.value
    assert min(*gaps, *slacks) >= -1e-10
    assert math.isclose(found.slack.value, lam * sum(gaps), abs_tol=1e-10)
    assert math.isclose(found.upper_bound.value - found.slack.value, found.supervised.value, abs_tol=1e-10)
    objective = theory.supervised_objective(z, labels, lam, population=population)
    assert math.isclose(objective.upper.value, found.supervised.value, abs_tol=1e-10)
    if population:
        assert objective.lower == objective.upper
    else:
        assert found.repel_decoupled.value <= found.repel_certified.value + 1e-10


def test_the_bound_agrees_with_a_naive_computation() -> None:
    z, labels = blobs(3, 3, 2, 4)
    tau, lam, rows = 0.4, 1.7, z.flatten(0, 1)
    label, image = labels.repeat_interleave(2), torch.arange(len(z)).repeat_interleave(2)
    prototype = torch.stack([rows[label == c].mean(0) for c in range(3)])
    share = labels.bincount().double() / len(labels)
    n = len(rows)
    for population in (True, False):
        repel, cosine, decoupled, excluded, constant, certified, ntxent, q = ([] for _ in range(8))
        for i, c in enumerate(label.tolist()):
            others = [y for y in range(3) if y != c]
            keys = [k for k in range(n) if population or image[k] != image[i]]
            counts = [sum(int(label[k]) == y for k in keys) / len(keys) for y in range(3)]
            u = {k: math.exp((rows[i] @ rows[k]).item() / tau) for k in keys}
            foreign = [u[k] for k in keys if label[k] != c]
            repel.append(max((rows[i] @ prototype[y]).item() for y in others))
            cosine.append(max((rows[i] @ prototype[y] / prototype[y].norm()).item() for y in others))
            decoupled.append(tau * math.log(sum(u.values()) / len(keys)) + tau * math.log(1 / min(counts)))
            excluded.append(tau * math.log(sum(foreign) / len(foreign)))
            constant.append(tau * math.log((1 - counts[c]) / min(counts[y] for y in others)))
            certified.append(tau * math.log((2 * math.exp(1 / tau) + sum(u.values())) / n))
            positive = sum(
                math.exp((rows[i] @ rows[k]).item() / tau) for k in range(n) if image[k] == image[i] and k != i
            )
            ntxent.append(tau * math.log((sum(u.values()) + positive) / (n - 1)))
            q.append(1 - sum(foreign) / sum(u.values()))
        mean = lambda x: sum(x) / len(x)  # noqa: E731
        (found,) = theory.bound(z, labels, [tau], lam, population=population)
        own = 0 if population else 1
        b = [((rows[label == c].sum(0) / 2).square().sum() - own * z[labels == c].mean(1).square().sum()).item()
             / int((labels == c).sum()) / (int((labels == c).sum()) - own) for c in range(3)]  # fmt: skip
        attract = -sum(p * x for p, x in zip(share.tolist(), b, strict=True))
        expected = {
            "supervised": attract + lam * mean(repel),
            "upper_bound": attract + lam * mean(decoupled),
            "class_excluded": attract + lam * (mean(excluded) + mean(constant)),
            "cosine_prototypes": attract + lam * (mean(decoupled) + 1 - prototype.norm(dim=1).min().item()),
            "q_same": mean(q),
            "nscl_gap": mean([-math.log(1 - x) for x in q]),
        }
        length = sum(p * math.sqrt(max(0, x)) for p, x in zip(share.tolist(), b, strict=True))
        expected["cosine_prototypes_slack"] = expected["cosine_prototypes"] + length - lam * mean(cosine)
        if not population:
            expected["repel_certified"], expected["repel_ntxent"] = mean(certified), mean(ntxent)
            expected["certified"] = attract + lam * (mean(certified) + tau * math.log(1 / share.min().item()))
        for name, value in expected.items():
            assert math.isclose(getattr(found, name).value, value, abs_tol=1e-12), name


@pytest.mark.parametrize(("classes", "tau"), [(10, 0.5), (100, 0.1), (2, 0.5)])
def test_slack_at_neural_collapse(classes: int, tau: float) -> None:
    simplex = F.normalize(torch.eye(classes, dtype=torch.float64) - 1 / classes, dim=1).unsqueeze(1)
    (found,) = theory.bound(simplex, torch.arange(classes), [tau], 1.0, population=True)
    others = classes - 1
    slack = tau * math.log(math.exp(1 / tau) + others * math.exp(-1 / (others * tau))) + 1 / others
    assert math.isclose(found.slack.value, slack, rel_tol=1e-12)
    assert math.isclose(found.class_excluded_slack.value, tau * math.log(others), abs_tol=1e-12)


def test_repulsion_is_bracketed_in_the_mean() -> None:
    z, labels = blobs(3, 10, 6, 5)
    tau = 0.1
    (truth,) = theory.bound(z, labels, [tau], 1.0, population=True)
    found = [theory.bound(*draw(z, labels, 16, 2, seed), [tau], 1.0)[0] for seed in range(60)]
    names = ("repel_decoupled", "repel_jackknife", "repel_certified", "certified")
    mean = {name: sum(getattr(one, name).value for one in found) / len(found) for name in names}
    error = torch.tensor([one.repel_decoupled.value for one in found]).std().item() / len(found) ** 0.5
    target = truth.repel_decoupled.value
    assert mean["repel_decoupled"] < target - 2 * error
    assert abs(mean["repel_jackknife"] - target) < min(3 * error, target - mean["repel_decoupled"])
    assert mean["repel_certified"] > target
    assert mean["certified"] > truth.supervised.value
    claimed = sum(one.repel_decoupled.se**2 for one in found) / len(found)
    assert 0.7 < claimed**0.5 / (error * len(found) ** 0.5) < 1.4


@pytest.mark.parametrize("views", [1, 3])
def test_the_certified_mean_is_never_too_small_in_expectation(views: int) -> None:
    """For two-valued similarities, with every outcome of K other images enumerated."""
    tau = 0.5
    for low, high, chance in itertools.product((-1.0, -0.2), (0.3, 1.0), (0.01, 0.3, 0.9)):
        u = torch.tensor([low, high], dtype=torch.float64).sub(1).div(tau).exp()  # divided by exp(1 / tau)
        truth = math.log((1 - chance) * u[0] + chance * u[1]) + 1 / tau
        plain = []
        for k in range(9):
            hits = torch.arange(k + 1, dtype=torch.float64)
            log_weights = torch.lgamma(torch.tensor(k + 1.0)) - torch.lgamma(hits + 1) - torch.lgamma(k - hits + 1)
            weights = log_weights.exp() * chance**hits * (1 - chance) ** (k - hits)
            total = views * ((k - hits) * u[0] + hits * u[1])
            assert (weights @ certified_mean(total, k + 1, views, tau)).item() > truth
            if k:
                plain.append((weights @ (total / views / k).log()).item() + 1 / tau)
        assert max(plain) < truth
        assert plain == sorted(plain)


def test_jackknife_of_a_mean() -> None:
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([x.mean(), *((x.sum() - x[i]) / 39 for i in range(40))])
    corrected, error = jackknife(parts)
    assert math.isclose(corrected.item(), x.mean().item(), rel_tol=1e-12)
    assert math.isclose(error.item(), x.std().item() / 40**0.5, rel_tol=1e-12)


# --- collapse


def test_collapse_of_a_simplex() -> None:
    simplex = F.normalize(torch.eye(5, dtype=torch.float64) - 0.2, dim=1)
    labels = torch.arange(5).repeat(6)
    found = theory.collapse(simplex[labels].unsqueeze(1).repeat(1, 3, 1), labels)
    assert abs(found.nc1) < 1e-12
    assert abs(found.cdnv) < 1e-12
    assert (found.etf_mean, found.etf_sd, found.effective_rank) == pytest.approx((-0.25, 0, 4), abs=1e-6)
    assert found.rho == pytest.approx([1] * 5)
    assert found.spectrum == pytest.approx([0.25] * 4 + [0], abs=1e-12)


def test_collapse_agrees_with_a_naive_computation() -> None:
    z, labels = blobs(3, 40, 3, 4)
    found = theory.collapse(z, labels)
    prototype = torch.stack([z[labels == c].mean((0, 1)) for c in range(3)])
    within = sum(torch.outer(x, x) for x in (z - prototype[labels].unsqueeze(1)).flatten(0, 1)) / z[..., 0].numel()
    between = torch.cov(prototype.T, correction=0)
    assert math.isclose(found.nc1, (within @ torch.linalg.pinv(between, rtol=1e-9)).trace().item() / 3, rel_tol=1e-9)
    truth = theory.collapse(z, labels, population=True)
    assert found.cdnv == pytest.approx(truth.cdnv, rel=0.1)
    assert found.cdnv > truth.cdnv  # prototypes of a sample lie too far apart
    assert sum(found.spectrum) == pytest.approx(1)


# --- thresholds


def test_thresholds_at_known_values() -> None:
    onset = [theory.misalignment_onset(256, tau) for tau in (0.05, 0.1, 0.2, 0.5, 1.0)]
    assert onset == pytest.approx([0.5, 0.4945, 0.185, 0.012, 0.003], abs=5e-4)
    table = {0.5: (0.763, 0.697, 0.601, 0.469, 0.282, 0.170), 0.2: (0.769, 0.768, 0.762, 0.751, 0.718, 0.670)}
    for tau, row in table.items():
        found = [theory.class_threshold(classes, tau, 0.7) for classes in (2, 5, 10, 20, 50, 100)]
        assert found == pytest.approx(row, abs=5e-4)
    assert theory.class_threshold(100, 0.01, 0.7) == pytest.approx(1 / 1.3, abs=1e-6)

    assert theory.misalignment_onset(256, 0.2, views=4) == pytest.approx(0.234, abs=5e-4)
    assert theory.misalignment_onset(256, 0.2, views=4, decoupled=True) == 0


@pytest.mark.parametrize(("images", "tau"), [(4, 0.5), (30, 0.2), (256, 0.2)])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_positives_separate_below_the_misalignment_onset(images: int, tau: float, views: int) -> None:
    onset = theory.misalignment_onset(images, tau, views=views)
    d, positives = views * (images - 1), views - 1

    def loss(a: float, alpha: float) -> float:
        """Half the balanced loss for similarity a of positives and the least possible one of other pairs; convex."""
        b = -(1 + positives * a) / d
        return -alpha * a / tau + (1 - alpha) * math.log(positives * math.exp(a / tau) + d * math.exp(b / tau))

    for alpha in (onset - 1e-5, onset + 1e-5):
        slope = loss(1 + 1e-6, alpha) - loss(1 - 1e-6, alpha)
        assert (slope > 0) == (alpha < onset)  # the minimum is at a < 1 only below the onset


def best_embedding(images: int, views: int, d: int, alpha: float, tau: float) -> float:
    """The similarity of positives where the balanced loss is least over free unit embeddings, from a random start."""
    draw = torch.Generator().manual_seed(0)
    free = torch.randn(views, images, d, dtype=torch.float64, generator=draw).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    loss = BalancedLoss(alpha=alpha, temperature=tau)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(*F.normalize(free, dim=2)).total
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[arg-type]
    z = F.normalize(free.detach(), dim=2)
    return (z[0] * z[1]).sum(1).mean().item()


@pytest.mark.parametrize("views", [2, 3])
def test_the_onset_is_that_of_free_embeddings(views: int) -> None:
    onset = theory.misalignment_onset(5, 0.3, views=views)
    assert best_embedding(5, views, 6, onset * 1.03, 0.3) > 0.9999
    assert best_embedding(5, views, 6, onset * 0.9, 0.3) < 0.99


def test_in_few_dimensions_the_onset_lies_lower() -> None:
    onset = theory.misalignment_onset(16, 0.3)
    assert best_embedding(16, 2, 15, 0.85 * onset, 0.3) < 0.99
    assert best_embedding(16, 2, 8, 0.85 * onset, 0.3) > 0.9999
    form = LogSumExpForm(0.3, decoupled=False)
    exact = [edges(form, r_max=0.5, images=16, views=2, width=width).alpha_mis_exact for width in (14, 15)]
    assert exact == [False, True]
    assert edges(form._replace(decoupled=True), r_max=0.5, images=16, views=2, width=2).alpha_mis_exact


def gram_loss(gram: Tensor, alpha: float, tau: float) -> float:
    """The balanced loss of unit embeddings with this Gram matrix [2B, 2B], views one after the other."""
    values, vectors = torch.linalg.eigh(gram)
    z = vectors * values.clamp(min=0).sqrt()
    return BalancedLoss(alpha=alpha, temperature=tau)(*z.chunk(2)).total.item()


def excess_over_collapse(z: Tensor, alpha: float, tau: float) -> tuple[float, float]:
    """(tau / 2 times the loss of the population z [n, M, d] beyond that of the constant embedding, 1 - |mu|^2)."""
    rows = z.flatten(0, 1)
    repel = tau * ((rows @ rows.T / tau).logsumexp(1).mean().item() - math.log(len(rows)))
    attract = -z.mean(1).square().sum(1).mean().item()
    return alpha * (attract + 1) + (1 - alpha) * (repel - 1), 1 - rows.mean(0).square().sum().item()


def largest_correlation(z: Tensor) -> float:
    """The largest correlation between views over all linear functions of the population z [n, M, d]."""
    rows = z.flatten(0, 1) - z.mean((0, 1))
    means = z.mean(1) - z.mean((0, 1))
    scale, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = scale > 1e-12
    if not kept.any():
        return 0.0
    whiten = basis[:, kept] * scale[kept].rsqrt()
    return torch.linalg.eigvalsh(whiten.T @ (means.T @ means / len(means)) @ whiten)[-1].item()


@given(blobs_of(1), st.floats(0, 1), st.sampled_from([0.05, 0.2, 0.5, 2.0, 50.0]), st.floats(0, 20))
@settings(max_examples=1000, deadline=None)
def test_no_embedding_beats_collapse_above_the_threshold(
    population: tuple[Tensor, Tensor], alpha: float, tau: float, offset: float
) -> None:
    """At any alpha the loss is greater than there by (1 - |mu|^2) [alpha (1 - r_max) - (1 - alpha)] or more."""
    z = population[0]
    shift = offset * F.normalize(torch.ones(z.shape[2], dtype=z.dtype), dim=0)  # towards a single point
    z = F.normalize(z + shift, dim=2)
    r_max = largest_correlation(z)
    excess, spread = excess_over_collapse(z, alpha, tau)
    assert excess >= spread * (alpha * (1 - r_max) - (1 - alpha)) - 1e-9
    above = min(1.0, theory.collapse_threshold(r_max) + 1e-9)
    assert excess_over_collapse(z, above, tau)[0] >= -1e-9


@pytest.mark.parametrize("flipped", [4, 2, 1])
def test_the_threshold_of_collapse_is_sharp(flipped: int) -> None:
    """Where every direction has the correlation r, the bound is reached at high temperature and near collapse."""
    views = torch.tensor([-1.0] * flipped + [1.0] * (8 - flipped), dtype=torch.float64)
    feature = torch.stack([views, -views]).unsqueeze(2)  # of two images with 8 views, [2, 8, 1]
    r = views.mean().item() ** 2
    assert largest_correlation(feature) == pytest.approx(r, abs=1e-12)

    def ratio(size: float, tau: float, alpha: float) -> float:
        constant = math.sqrt(1 - size**2) * torch.ones_like(feature)
        excess, spread = excess_over_collapse(torch.cat([constant, size * feature], 2), alpha, tau)
        return excess / spread

    for alpha in (0.3, theory.collapse_threshold(r) - 0.02, theory.collapse_threshold(r) + 0.02):
        limit = alpha * (1 - r) - (1 - alpha)
        assert ratio(0.8, 1e6, alpha) == pytest.approx(limit, abs=1e-5)
        assert ratio(1e-3, 0.2, alpha) == pytest.approx(limit, abs=1e-4)
        assert ratio(0.8, 0.2, alpha) >= limit
        above = alpha > theory.collapse_threshold(r)
        assert (ratio(1e-3, 0.2, alpha) > 0) == above  # below it there are better embeddings next to the constant
    assert excess_over_collapse(torch.ones_like(feature), 0.4, 0.2) == pytest.approx((0, 0), abs=1e-15)


@pytest.mark.parametrize("tau", [0.2, 0.5])
@pytest.mark.parametrize("r", [0.0, 0.4, 0.9])
def test_constant_embeddings_are_stable_above_the_threshold(r: float, tau: float) -> None:
    images, step = 60, 1e-4
    n = 2 * images
    feature = torch.eye(n, dtype=torch.float64) + r * torch.eye(n, dtype=torch.float64).roll(images, 0)
    constant = torch.ones(n, n, dtype=torch.float64)
    for shift in (-0.02, 0.02):
        alpha = theory.collapse_threshold(r) + shift
        change = gram_loss((constant + step * feature) / (1 + step), alpha, tau) - gram_loss(constant, alpha, tau)
        assert (change > 0) == (shift > 0)
        growth = (1 - alpha) * (1 - r / (n - 1)) - alpha * (1 - r)
        assert change == pytest.approx(-2 * step / tau * growth, rel=1e-3)


@pytest.mark.parametrize(("tau", "alpha"), [(0.2, 0.4), (0.5, 0.5), (0.5, 0.7)])
def test_a_feature_is_admitted_above_the_threshold(tau: float, alpha: float) -> None:
    z, _ = blobs(3, 6, 2, 5, noise=0.2)
    pair = z.transpose(0, 1)  # [2, B, P]
    n, step = pair.shape[1], 1e-4
    gram = pair.flatten(0, 1) @ pair.flatten(0, 1).T
    r_star = admission_threshold(pair, tau, alpha).r_star.item()
    for shift in (-0.01, 0.01):
        feature = torch.eye(2 * n, dtype=torch.float64)
        feature = feature + (r_star + shift) * feature.roll(n, 0)
        change = gram_loss((gram + step * feature) / (1 + step), alpha, tau) - gram_loss(gram, alpha, tau)
        assert (change < 0) == (shift > 0)


def test_correlations_are_those_of_the_augmentation() -> None:
    draw = torch.Generator().manual_seed(0)
    r = torch.tensor([0.9, 0.6, 0.2, 0.0], dtype=torch.float64)
    n, labels = 20000, torch.arange(20000) % 2
    signal = torch.randn(n, 4, dtype=torch.float64, generator=draw)
    signal[:, 0] = 2.0 * labels - 1  # the best feature is the class
    mix = torch.randn(4, 6, dtype=torch.float64, generator=draw)  # six features of rank four
    noise = torch.randn(n, 2, 4, dtype=torch.float64, generator=draw)
    h = (r.sqrt() * signal.unsqueeze(1) + (1 - r).sqrt() * noise) @ mix
    found = theory.augmentation_correlations(h, ridge=1e-8)
    torch.testing.assert_close(found[:3], r[:3], atol=0.02, rtol=0)
    assert found[3:].abs().max() < 0.03
    assert theory.augmentation_correlations(h, labels)[0].item() == pytest.approx(0.6, abs=0.02)
    assert theory.collapse_threshold(0.9) == pytest.approx(1 / 1.1)
    assert theory.augmentation_correlations(h, components=2).shape == (2,)
    noise = torch.randn(200, 2, 60, generator=draw)
    assert theory.augmentation_correlations(noise)[0] < 0.35  # on the images of the fit it would be above 0.7
    assert theory.augmentation_correlations(torch.ones(10, 2, 3)).tolist() == [0, 0, 0]


# --- data


def test_float32_and_the_size_of_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels = blobs(3, 7, 4, 5)

    def everything(z: Tensor) -> Tensor:
        found = [theory.prototype_bias(z, labels), *theory.bound(z, labels, [0.2, 1.0], 0.5)]
        return torch.cat([values(one) for one in (*found, theory.supervised_objective(z, labels, 0.5))])

    before, state = everything(z), torch.get_rng_state()
    torch.testing.assert_close(everything(z.float()), before, atol=1e-6, rtol=1e-5)
    for chunk, rows in ((1, 1), (5, 7)):
        monkeypatch.setattr("scclr.theory.sample.IMAGES_AT_ONCE", chunk)
        monkeypatch.setattr("scclr.theory.pairs.TILE_VIEWS", rows)
        torch.testing.assert_close(everything(z), before, atol=1e-11, rtol=1e-9)
    assert torch.equal(state, torch.get_rng_state())


def test_a_class_of_one_image_is_dropped_and_reported() -> None:
    z, labels = blobs(3, 4, 2, 5)
    z, labels = torch.cat([z, z[:1]]), torch.cat([labels + (labels > 0), torch.tensor([1])])
    found, rest = theory.prototype_bias(z, labels), theory.prototype_bias(z[:-1], labels[:-1])
    assert (found.dropped, found.images) == ([1], len(z) - 1)
    assert found.b2.value == pytest.approx(rest.b2.value, rel=1e-12)
    assert math.isnan(found.by_class[1].value)
    assert len(found.by_class) == 4


def test_invalid_arguments_are_refused() -> None:
    z, labels = blobs(3, 4, 2, 5)
    spoiled = z.clone()
    spoiled[0, 0, 0] = math.nan
    calls: list[tuple[str, Callable[[], object]]] = [
        ("one view of every image", lambda: theory.prototype_bias(z[:, :1], labels)),
        ("1 rows of z are not finite", lambda: theory.prototype_bias(spoiled, labels)),
        ("not of unit length", lambda: theory.prototype_bias(2 * z, labels)),
        (r"give z \[n, M, d\]", lambda: theory.prototype_bias(z[0], labels)),
        (r"int64 \[n\]", lambda: theory.prototype_bias(z, labels.double())),
        ("temperatures", lambda: theory.bound(z, labels, [], 1.0)),
        ("positive", lambda: theory.bound(z, labels, [0.0], 1.0)),
        ("lam=-1", lambda: theory.bound(z, labels, [0.5], -1.0)),
        ("only one class has 2 images", lambda: theory.supervised_objective(z, 0 * labels, 1.0)),
        ("4 images", lambda: theory.augmentation_correlations(z[:3])),
        ("2 views", lambda: theory.augmentation_correlations(z[:, :1])),
        ("not finite", lambda: theory.augmentation_correlations(spoiled)),
        ("classes=1", lambda: theory.class_threshold(1, 0.5, 0.5)),
        ("images=1", lambda: theory.misalignment_onset(1, 0.5)),
        ("views=1", lambda: theory.misalignment_onset(9, 0.5, views=1)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, -1, -1], "2 images have no label"),
        ([0, 0, 1], "3 images are too few"),
        ([], "0 images are too few"),
        ([0, 1, 2, 3], "no class has 2 images"),
        ([0, 0, 1, 2], "only one class has 2 images"),
        ([1, 1, 1, 1], "only one class has 2 images"),
        ([0, 0, 3, 3], None),
        ([0, 0, 1, 2, 2], None),
    ],
)
def test_labels_are_refused_exactly_where_the_theory_cannot_be_computed(labels: list[int], message: str | None) -> None:
    y = torch.tensor(labels, dtype=torch.int64)
    z, _ = blobs(1, len(y), 2, 3)

    def compute() -> None:
        theory.bound(z, y, [0.5], 1.0)
        theory.augmentation_correlations(z)

    if message is None:
        theory.check_labels(y)
        compute()
        return
    with pytest.raises(ValueError, match=message):
        theory.check_labels(y)
    with pytest.raises(ValueError, match="image"):
        compute()

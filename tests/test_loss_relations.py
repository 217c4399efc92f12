"""How the losses relate to each other and to mutual information."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import LABELS, alphas, close, few, gradient, seeds, temperatures, unit_views
from references import nscl as luthra
from torch import Tensor

from scclr.losses.align_uniform import AlignUniformLoss
from scclr.losses.balanced import BalancedLoss
from scclr.losses.debiased import DebiasedLoss
from scclr.losses.decoupled import DecoupledLoss
from scclr.losses.infonce import InfoNCELoss
from scclr.losses.nscl import NSCLLoss
from scclr.losses.ntxent import NTXentLoss
from scclr.losses.pairs import row_logsumexp
from scclr.losses.prototype import PrototypeLoss
from scclr.losses.spectral import SpectralLoss
from scclr.losses.supcon import SupConLoss


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds)
def test_decoupled_loss_exceeds_nscl_by_the_mass_on_the_own_class(alpha, temperature, seed):
    views = unit_views(seed)
    z, image = torch.cat(views), torch.arange(5).repeat(2)
    label = LABELS[image]
    others = (z @ z.T / temperature).masked_fill(image.unsqueeze(0) == image.unsqueeze(1), -math.inf)
    mass = (others.softmax(1) * (label.unsqueeze(0) == label.unsqueeze(1))).sum(1)
    arguments = {"alpha": alpha, "temperature": temperature}
    gap = DecoupledLoss(**arguments)(*views).total - NSCLLoss(**arguments)(*views, labels=LABELS).total
    close(gap, 2 * (1 - alpha) * -torch.log1p(-mass).mean())


@few
@given(temperature=temperatures, seed=seeds, count=st.integers(2, 3))
def test_nscl_contains_the_equation_and_the_code_of_its_authors(temperature, seed, count):
    views = unit_views(seed, count=count)
    tau = {"temperature": temperature}
    pairs = NSCLLoss(alpha=(count - 1) / (2 * count - 1), **tau)
    factor = (2 * count - 1) / (2 * count)
    equation = luthra.equation(views, LABELS, temperature)
    close(equation, factor * pairs(*views, labels=LABELS).total - 1 / (count * temperature))
    found = gradient(lambda *v: factor * pairs(*v, labels=LABELS).total, views)
    close(found, gradient(lambda *v: luthra.equation(list(v), LABELS, temperature), views), 1e-11)
    if count == 2:
        code = NSCLLoss(alpha=0.5, **tau, positive_in_denominator=True)
        close(code(*views, labels=LABELS).total, luthra.code(views, LABELS, temperature))
        found = gradient(lambda *v: code(*v, labels=LABELS).total, views)
        close(found, gradient(lambda *v: luthra.code(list(v), LABELS, temperature), views), 1e-11)


@pytest.mark.parametrize(("temperature", "gap", "of_equal_classes", "bound"), [(1.0, 3.77, 2.13, 4.21)])
def test_the_gap_to_nscl_is_bounded_by_the_largest_class(temperature, gap, of_equal_classes, bound):
    """Two classes of 18 and 2 images, each at one point, opposite to each other."""
    labels = torch.tensor([0] * 18 + [1] * 2)
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)[labels]
    arguments = {"alpha": 0.5, "temperature": temperature}
    found = (
        DecoupledLoss(**arguments)(points, points).total - NSCLLoss(**arguments)(points, points, labels=labels).total
    )
    assert found == pytest.approx(gap, abs=5e-3)
    assert math.log(1 + math.exp(2 / temperature) / 1) == pytest.approx(of_equal_classes, abs=5e-3)
    assert math.log(1 + 18 * math.exp(2 / temperature) / 2) == pytest.approx(bound, abs=5e-3)
    assert found < math.log(1 + 18 * math.exp(2 / temperature) / 2)


@few
@given(temperature=temperatures, seed=seeds)
def test_factors_to_well_known_implementations(temperature, seed):
    """What the docstrings say of google-research/simclr, the authors of the decoupled loss, CLIP and SupContrast."""
    one, other = views = unit_views(seed)
    s = [[a @ b.T / temperature for b in views] for a in views]
    own, apart = torch.arange(5), torch.eye(5, dtype=torch.float64) * -1e9

    def simclr(v: int, w: int) -> Tensor:
        return F.cross_entropy(torch.cat([s[v][w], s[v][v] + apart], 1), own)

    def decoupled(v: int, w: int) -> Tensor:
        return (torch.cat([s[v][v] + apart, s[v][w] + apart], 1).logsumexp(1) - s[v][w].diagonal()).mean()

    arguments = {"alpha": 0.5, "temperature": temperature}
    close(simclr(0, 1) + simclr(1, 0), 2 * NTXentLoss(temperature=temperature)(one, other).total)
    close(decoupled(0, 1) + decoupled(1, 0), 2 * DecoupledLoss(**arguments)(one, other).total)
    clip = (F.cross_entropy(s[0][1], own) + F.cross_entropy(s[1][0], own)) / 2
    close(clip, InfoNCELoss(**arguments)(one, other).total)
    z, label = torch.cat(views), LABELS.repeat(2)
    log_p = (z @ z.T / temperature).fill_diagonal_(-math.inf).log_softmax(1).fill_diagonal_(0)
    positive = (label.unsqueeze(0) == label.unsqueeze(1)).double().fill_diagonal_(0)
    supcon = -(temperature / 0.07) * ((positive * log_p).sum(1) / positive.sum(1)).mean()
    close(supcon, temperature / 0.07 * SupConLoss(**arguments)(one, other, labels=LABELS).total)


@few
@given(mu=st.sampled_from([0.5, 1.0, 3.0]), seed=seeds)
def test_the_official_spectral_loss_has_negatives_in_the_other_view_only(mu, seed):
    one, other = (math.sqrt(mu) * view for view in unit_views(seed))
    off = ~torch.eye(5, dtype=torch.bool)
    across, within = (one @ other.T)[off].square().mean(), [(z @ z.T)[off].square().mean() for z in (one, other)]
    official = (-2 * (one * other).sum(1).mean() + across) / mu
    found = SpectralLoss(alpha=0.5, mu=mu)(*unit_views(seed)).total
    close(found / mu, official - across / mu + (across + sum(within) / 2) / (2 * mu))


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds, count=st.integers(2, 3))
def test_supcon_exceeds_simclr_by_the_prototype_bias(alpha, temperature, seed, count):
    """The difference is 2 alpha / tau times the share of positives from other images times E |mu_x - mu_y|^2."""
    each, labels = 3, torch.tensor([0, 1, 0, 1, 1, 0])
    views = unit_views(seed, images=6, count=count)
    z = torch.stack(views)  # [V, B, P]
    within = (z.sum(0).square().sum(1) - count).mean() / (count * (count - 1))  # E <F, F'> of one image
    mean = z.mean(0)  # [B, P]
    members = [mean[labels == c] for c in (0, 1)]
    pairs = torch.stack([one.sum(0).square().sum() - one.square().sum() for one in members])
    across = pairs.mean() / (each * (each - 1))  # E <F, F'> of two images of one class
    share = count * (each - 1) / (count * each - 1)
    arguments = {"alpha": alpha, "temperature": temperature}
    difference = SupConLoss(**arguments)(*views, labels=labels).total - BalancedLoss(**arguments)(*views).total
    close(difference, 2 * alpha / temperature * share * (within - across))


@few
@given(temperature=temperatures, seed=seeds)
def test_uniformity_bounds_repulsion(temperature, seed):
    """With means over negatives, R <= L_uniform + 1 / tau at t = 1 / (2 tau); they are equal where all R_i are."""
    views = unit_views(seed)
    uniform = AlignUniformLoss(alpha=0.5, t=1 / (2 * temperature))(*views).repel
    mean = torch.stack([row_logsumexp(view, temperature) for view in views]).mean() - math.log(4)
    assert mean <= uniform + 1 / temperature + 1e-12
    simplex = F.normalize(torch.eye(5, dtype=torch.float64) - 1 / 5, dim=1)
    uniform = AlignUniformLoss(alpha=0.5, t=1 / (2 * temperature))(simplex, simplex).repel
    close(row_logsumexp(simplex, temperature).mean() - math.log(4), uniform + 1 / temperature)


def test_only_infonce_bounds_mutual_information():
    """Views of two equiprobable images share log 2 nats; all batches of six images are enumerated."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    best = {"infonce": -math.inf, "ntxent": -math.inf}
    batches = [rows[list(images)] for images in itertools.product((0, 1), repeat=6)]
    for temperature in (0.2, 0.5, 0.8, 1.2, 2.0):
        cross = InfoNCELoss(alpha=0.5, temperature=temperature)
        both = NTXentLoss(temperature=temperature)
        bounds = {
            "infonce": math.log(6) - torch.stack([cross(z, z).total for z in batches]).mean(),
            "ntxent": math.log(11) - torch.stack([both(z, z).total for z in batches]).mean(),
        }
        best = {name: max(best[name], float(bounds[name])) for name in best}
    assert best["infonce"] <= math.log(2)
    assert best["ntxent"] > math.log(2) + 1e-3


def test_a_batch_of_one_class_has_no_other_classes():
    for loss in (
        NSCLLoss(alpha=0.5, temperature=0.2),
        PrototypeLoss(alpha=0.5, temperature=0.2, repulsion="max", classes=4),
        PrototypeLoss(alpha=0.5, temperature=0.2, repulsion="logsumexp", classes=4),
    ):
        assert loss(*unit_views(0), labels=torch.zeros(5, dtype=torch.int64)).repel == -math.inf


def test_losses_agree_in_special_cases():
    views = unit_views(1)
    simclr = NTXentLoss(temperature=0.5)(*views)
    close(DebiasedLoss(alpha=0.5, temperature=0.5, class_prior=0.0)(*views).total, simclr.total)
    own = torch.arange(5)
    close(SupConLoss(alpha=0.5, temperature=0.5)(*views, labels=own).total, simclr.total)
    decoupled = DecoupledLoss(alpha=0.3, temperature=0.5)(*views)
    assert NSCLLoss(alpha=0.3, temperature=0.5)(*views, labels=own) == decoupled


def test_few_true_negatives_fall_to_the_floor():
    """Where nothing is left of the mean, g = exp(-1 / tau), and the gradient is finite."""
    z = torch.eye(5, dtype=torch.float64)
    loss = DebiasedLoss(alpha=0.5, temperature=0.2, class_prior=0.9)
    close(loss(z, z).repel, math.log(math.exp(5) + 8 * math.exp(-5)))
    assert gradient(lambda *v: loss(*v).total, [z, z]).isfinite().all()

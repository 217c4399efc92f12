"""Every loss against its paper, and the properties that the balanced family must have."""

import inspect
import itertools
import math

import pytest
import references
import torch
import torch.nn.functional as F
from allocations import Largest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scclr import metrics
from scclr.config import UserError, build, conf_dir
from scclr.losses import Keys, LossTerms
from scclr.losses.align_uniform import AlignUniformLoss
from scclr.losses.balanced import BalancedLoss
from scclr.losses.debiased import DebiasedLoss
from scclr.losses.decoupled import DecoupledLoss
from scclr.losses.hard_negative import HardNegativeLoss
from scclr.losses.infonce import InfoNCELoss
from scclr.losses.nscl import NSCLLoss
from scclr.losses.ntxent import NTXentLoss
from scclr.losses.pairs import row_logsumexp
from scclr.losses.prototype import PrototypeLoss
from scclr.losses.sigmoid import SigmoidLoss
from scclr.losses.spectral import SpectralLoss
from scclr.losses.supcon import SupConLoss

few = settings(max_examples=20, deadline=None, derandomize=True)
alphas = st.floats(0, 1)
temperatures = st.sampled_from([0.1, 0.2, 0.5, 1.0])
seeds = st.integers(0, 999)

LABELS = torch.tensor([2, 0, 2, 1, 0])

# name: constructor, its arguments without alpha, the paper's (A, R) from views and labels
LOSSES = {
    "ntxent": (NTXentLoss, {"temperature": 0.2}, lambda v, y: references.ntxent(v, 0.2)),
    "balanced": (BalancedLoss, {"temperature": 0.2}, lambda v, y: references.ntxent(v, 0.2)),
    "decoupled": (DecoupledLoss, {"temperature": 0.2}, lambda v, y: references.decoupled(v, 0.2)),
    "infonce": (InfoNCELoss, {"temperature": 0.2}, lambda v, y: references.infonce(v, 0.2)),
    "debiased": (
        DebiasedLoss,
        {"temperature": 0.5, "class_prior": 0.2},
        lambda v, y: references.debiased(v, 0.5, 0.2),
    ),
    "hard_negative": (
        HardNegativeLoss,
        {"temperature": 0.5, "class_prior": 0.1, "hardness": 0.7},
        lambda v, y: references.hard_negative(v, 0.5, 0.1, 0.7),
    ),
    "supcon": (SupConLoss, {"temperature": 0.2}, lambda v, y: references.supcon(v, 0.2, y)),
    "nscl": (NSCLLoss, {"temperature": 0.2}, lambda v, y: references.nscl(v, 0.2, y)),
    "prototype": (
        PrototypeLoss,
        {"temperature": 0.2, "repulsion": "max", "momentum": 0.0, "classes": 4},
        lambda v, y: references.prototype(v, 0.2, y, "max"),
    ),
    "prototype_logsumexp": (
        PrototypeLoss,
        {"temperature": 0.2, "repulsion": "logsumexp", "momentum": 0.0, "classes": 4},
        lambda v, y: references.prototype(v, 0.2, y, "logsumexp"),
    ),
    "align_uniform": (AlignUniformLoss, {"t": 2.0}, lambda v, y: references.align_uniform(v, 2.0)),
    "spectral": (SpectralLoss, {"mu": 3.0}, lambda v, y: references.spectral(v, 3.0)),
    "sigmoid": (SigmoidLoss, {"scale": 10.0, "bias": -3.0}, lambda v, y: references.sigmoid(v, 10.0, -3.0)),
}
WITH_BALANCE = [name for name in LOSSES if name != "ntxent"]
every_loss = pytest.mark.parametrize("name", LOSSES)


def make(name: str, alpha: float = 0.5, **changed):
    constructor, arguments, _ = LOSSES[name]
    return constructor(**({} if name == "ntxent" else {"alpha": alpha}), **arguments | changed)


def unit_views(seed: int, images: int = 5, width: int = 4, count: int = 2, noise: float = 0.7) -> list[Tensor]:
    """Views [images, width] that are ``noise`` away from a common image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, width, generator=generator, dtype=torch.float64)
    noises = noise * torch.randn(count, images, width, generator=generator, dtype=torch.float64)
    return list(F.normalize(image + noises, dim=2))


def gradient(function, views: list[Tensor]) -> Tensor:
    """d function / d views, [V, B, P], as the sphere sees it: without the part along each row."""
    leaves = [view.clone().requires_grad_() for view in views]
    raw = torch.stack(torch.autograd.grad(function(*leaves), leaves))
    rows = torch.stack(views)
    return raw - (raw * rows).sum(2, keepdim=True) * rows


def close(a, b, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


# Every loss -----------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize(("count", "alpha"), [(2, 0.5), (2, 0.2), (3, 0.7)])
def test_the_paper(name, count, alpha):
    alpha = 0.5 if name == "ntxent" else alpha
    views, loss, paper = unit_views(1, count=count), make(name, alpha), LOSSES[name][2]

    def expected(*views: Tensor) -> Tensor:
        attract, repel = paper(list(views), LABELS)
        return 2 * (alpha * attract + (1 - alpha) * repel)

    terms = loss(*views, labels=LABELS)
    attract, repel = paper(views, LABELS)
    for found, wanted in zip(terms, (expected(*views), attract, repel), strict=True):
        close(found, wanted)
    close(gradient(lambda *v: loss(*v, labels=LABELS).total, views), gradient(expected, views), 1e-11)


@every_loss
def test_many_tiles(name, monkeypatch):
    """The default tile is larger than any test's batch."""
    views, labels = unit_views(2, images=60), torch.arange(60) % 4
    loss = make(name, 0.4)
    expected = [*loss(*views, labels=labels), gradient(lambda *v: loss(*v, labels=labels).total, views)]
    for module in ("pairs", "sigmoid"):
        monkeypatch.setattr(f"scclr.losses.{module}.tile_of", lambda device: 7)
    found = [*loss(*views, labels=labels), gradient(lambda *v: loss(*v, labels=labels).total, views)]
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@every_loss
def test_memory_is_linear(name, monkeypatch):
    for module in ("pairs", "sigmoid"):
        monkeypatch.setattr(f"scclr.losses.{module}.tile_of", lambda device: 16)
    views = [view.requires_grad_() for view in unit_views(2, images=100)]
    with Largest() as largest:
        make(name)(*views, labels=torch.arange(100) % 4).total.backward()
    assert largest.elements == 200 * 4  # the embeddings; never 200 * 200 or 100 * 100


@every_loss
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_over_processes_is_the_loss_of_one(name, alpha, count):
    views, labels, processes = unit_views(3, images=6, count=count), torch.tensor([2, 0, 2, 1, 0, 0]), 3
    loss = make(name, alpha)

    def over_processes(term: str):
        def mean(*views: Tensor) -> Tensor:
            keys, parts = Keys(views, labels, 0), []
            for start in range(0, 6, 2):
                local = (view[start : start + 2] for view in views)
                terms = loss(*local, labels=labels[start : start + 2], keys=keys._replace(start=start))
                parts.append(getattr(terms, term))
            return torch.stack(parts).sum() / processes

        return mean

    def alone(term: str):
        return lambda *views: getattr(loss(*views, labels=labels), term)

    for term in LossTerms._fields:
        close(over_processes(term)(*views), alone(term)(*views))
        close(gradient(over_processes(term), views), gradient(alone(term), views))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_input_precision(name, dtype):
    views = [view.to(dtype) for view in unit_views(4)]
    terms = make(name)(*views, labels=LABELS)
    assert {term.dtype for term in terms} == {torch.float32}
    exact = make(name)(*[view.double() for view in views], labels=LABELS)
    for found, wanted in zip(terms, exact, strict=True):
        close(found, wanted, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert make(name)(*views, labels=LABELS) == terms


@every_loss
@pytest.mark.parametrize("sharpness", [0.01, 0.5])
@pytest.mark.parametrize("kind", ["identical", "antipodal", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_finite(name, sharpness, kind, dtype):
    z = unit_views(5)[0]
    z1, z2 = {"identical": (z[:1].expand(5, -1),) * 2, "antipodal": (z, -z), "aligned": (z, z)}[kind]
    views = [z1.to(dtype), z2.to(dtype)]
    loss = make(name, **({"temperature": sharpness} if "temperature" in LOSSES[name][1] else {}))
    assert all(term.isfinite() for term in loss(*views, labels=LABELS))
    assert gradient(lambda *v: loss(*v, labels=LABELS).total, views).isfinite().all()


@every_loss
def test_nan_reaches_the_total_and_zero_rows_do_not_make_one(name):
    z1, z2 = unit_views(6)
    assert make(name)(torch.zeros_like(z1), z2, labels=LABELS).total.isfinite()
    z1[0, 0] = math.nan
    assert make(name)(z1, z2, labels=LABELS).total.isnan()


@every_loss
def test_permutations(name):
    """Images may be renumbered; the value stays and gradients move along. Views may be swapped."""
    views, loss, order = unit_views(7), make(name, 0.3), torch.tensor([3, 1, 4, 0, 2])
    total = loss(*views, labels=LABELS).total
    close(loss(*(view[order] for view in views), labels=LABELS[order]).total, total)
    close(loss(*views[::-1], labels=LABELS).total, total)
    moved = gradient(lambda *v: loss(*v, labels=LABELS[order]).total, [view[order] for view in views])
    close(moved, gradient(lambda *v: loss(*v, labels=LABELS).total, views)[:, order])


@every_loss
def test_rotations(name):
    """The value is invariant, so no gradient turns all rows together: sum_i z_i g_i^T is symmetric."""
    views, loss = unit_views(8), make(name, 0.3)
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    close(loss(*(view @ q for view in views), labels=LABELS).total, loss(*views, labels=LABELS).total)
    turn = torch.cat(views).T @ gradient(lambda *v: loss(*v, labels=LABELS).total, views).flatten(0, 1)  # [P, P]
    close(turn, turn.T)


@pytest.mark.parametrize("name", WITH_BALANCE)
@few
@given(alpha=alphas, seed=seeds)
def test_one_balance(name, alpha, seed):
    """total = 2 (alpha A + (1 - alpha) R) with A and R that do not depend on alpha."""
    views = unit_views(seed)
    total, attract, repel = make(name, alpha)(*views, labels=LABELS)
    close(total, 2 * (alpha * attract + (1 - alpha) * repel))
    assert make(name, 0.25)(*views, labels=LABELS)[1:] == (attract, repel)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "prototype"])  # a maximum has no second derivative
def test_second_derivatives(name):
    views = [view.requires_grad_() for view in unit_views(9, images=3)]
    loss, labels = make(name, 0.4), torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(lambda *v: loss(*v, labels=labels).total, views)
    assert torch.autograd.gradgradcheck(lambda *v: loss(*v, labels=labels).total, views)


@every_loss
def test_without_data_and_on_a_device_that_is_not_there(name):
    empty = [torch.empty(5, 4, device="meta", requires_grad=True) for _ in range(2)]
    loss = make(name).to("meta")
    loss(*empty, labels=torch.empty(5, dtype=torch.int64, device="meta")).total.backward()
    assert empty[0].grad.shape == (5, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a fake GPU has no values: to wait for one raises
        views = [torch.empty(5, 4, device="cuda") for _ in range(2)]
        labels = torch.empty(5, dtype=torch.int64, device="cuda")
        fake = make(name).to("cuda")
        assert all(term.device.type == "cuda" for term in fake(*views, labels=labels))


@every_loss
def test_bad_shapes(name):
    loss, (z1, z2) = make(name), unit_views(0)
    for views in ([z1], [z1, z2[:3]], [z1[0], z2[0]], [z1[:0], z2[:0]]):
        with pytest.raises(ValueError, match="views have shapes"):
            loss(*views, labels=LABELS)
    with pytest.raises(ValueError, match=r"keys\.start=4: 2 images from there do not fit among 5"):
        loss(z1[:2], z2[:2], labels=LABELS[:2], keys=Keys((z1, z2), LABELS, 4))
    with pytest.raises(ValueError, match=r"keys.views must be 2 of one shape \[G, 4\]"):
        loss(z1, z2, labels=LABELS, keys=Keys((z1,), LABELS, 0))


@every_loss
def test_labels(name):
    loss, views = make(name), unit_views(0)
    if not loss.supervised:
        assert loss(*views) == loss(*views, labels=LABELS)
        return
    with pytest.raises(ValueError, match="a supervised loss needs labels"):
        loss(*views)
    for labels in (LABELS[:3], LABELS.double()):
        with pytest.raises(ValueError, match=r"labels are .*: give int64 \[5\]"):
            loss(*views, labels=labels)
    with pytest.raises(ValueError, match=r"a supervised loss needs keys\.labels"):
        loss(*views, labels=LABELS, keys=Keys(tuple(views), None, 0))


@every_loss
def test_one_image(name):
    views, loss, labels = unit_views(0, images=1), make(name), torch.tensor([0])
    if loss.least_images == 2:
        with pytest.raises(ValueError, match="needs 2 images or more, not 1"):
            loss(*views, labels=labels)
    elif not loss.supervised or name == "supcon":
        assert loss(*views, labels=labels).total.isfinite()


def test_a_batch_of_one_class_has_no_other_classes():
    for name in ("nscl", "prototype", "prototype_logsumexp"):
        assert make(name)(*unit_views(0), labels=torch.zeros(5, dtype=torch.int64)).repel == -math.inf


BAD = [
    ("alpha", -0.1), ("alpha", 1.1), ("alpha", None), ("alpha", math.nan), ("temperature", 0.0),
    ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("class_prior", 1.0),
    ("hardness", -1.0), ("t", 0.0), ("mu", -1.0), ("scale", 0.0), ("bias", math.inf), ("momentum", 1.0),
    ("classes", 1), ("repulsion", "mean"), ("similarity", "l2"), ("rescale", "all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(name, *bad) for name in LOSSES for bad in BAD if bad[0] in inspect.signature(LOSSES[name][0]).parameters],
)
def test_bad_arguments(name, argument, value):
    constructor, arguments, _ = LOSSES[name]
    balance = {} if name == "ntxent" else {"alpha": 0.5}
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        constructor(**balance | arguments | {argument: value})


def test_every_file_has_a_configuration_that_builds():
    files = {path.stem for path in (conf_dir() / "loss").glob("*.yaml")}
    assert files == {name for name in LOSSES if name != "prototype_logsumexp"}
    for name in files:
        loss = build("loss", _node(name), classes=10)
        labels = LABELS if loss.supervised else None
        assert loss(*unit_views(0), labels=labels).total.isfinite()
    with pytest.raises(UserError, match=r"loss.temprature: .* did you mean temperature\?"):
        build("loss", _node("ntxent") | {"temprature": 1.0})


def _node(name: str) -> dict:
    from omegaconf import OmegaConf

    whole = OmegaConf.load(conf_dir() / "loss" / f"{name}.yaml")
    if name != "ntxent":
        assert (conf_dir() / "loss" / f"{name}.yaml").read_text().startswith("# @package _global_\n")
    return OmegaConf.to_container(whole, resolve=True).get("loss") or OmegaConf.to_container(whole, resolve=True)


# The balanced loss ----------------------------------------------------------------------------------------------------


def balanced(alpha: float, temperature: float, views: list[Tensor], **options) -> Tensor:
    return BalancedLoss(alpha=alpha, temperature=temperature, **options)(*views).total


@few
@given(temperature=temperatures, seed=seeds)
def test_half_is_cross_entropy(temperature, seed):
    views = unit_views(seed)
    expected = references.cross_entropy(views, temperature)
    close(balanced(0.5, temperature, views), expected)
    assert expected >= 0
    single = balanced(0.5, temperature, [view.float() for view in views])
    close(single, expected, 1e-6)
    terms, ntxent = BalancedLoss(alpha=0.5, temperature=0.2)(*views), NTXentLoss(temperature=0.2)(*views)
    assert terms == ntxent


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("noise", [0.3, 0.9])
def test_float32_accuracy(temperature, alpha, noise):
    """Also where positives are easy, and NT-Xent is many orders of magnitude smaller than A and R."""
    views = [view.float() for view in unit_views(0, images=151, width=32, noise=noise)]
    loss, wide = BalancedLoss(alpha=alpha, temperature=temperature), [view.double() for view in views]
    tolerance = 1e-6 if temperature >= 0.1 else 5e-5  # float32 similarities, over the temperature, in an exponential
    for found, exact in zip(loss(*views), loss(*wide), strict=True):
        assert abs(found - exact) <= tolerance * abs(exact)
    expected = gradient(lambda *v: loss(*v).total, wide)
    error = gradient(lambda *v: loss(*v).total, views) - expected
    assert error.norm() <= (1e-5 if temperature >= 0.1 else 1e-4) * expected.norm()


@few
@given(temperature=temperatures, seed=seeds, alpha=alphas)
def test_affine_in_alpha(temperature, seed, alpha):
    views = unit_views(seed)
    ends = [balanced(a, temperature, views) for a in (0, 1)]
    close(balanced(alpha, temperature, views), (1 - alpha) * ends[0] + alpha * ends[1])
    _, attract, repel = BalancedLoss(alpha=0.5, temperature=temperature)(*views)
    close(ends, [2 * repel, 2 * attract])


@few
@given(temperature=temperatures, seed=seeds, alpha=alphas)
def test_gradient_in_closed_form(temperature, seed, alpha):
    views = unit_views(seed)
    leaves = [view.clone().requires_grad_() for view in views]
    found = torch.cat(torch.autograd.grad(balanced(alpha, temperature, leaves), leaves))
    close(found, references.balanced_gradient(views, temperature, alpha))
    by_similarity = references.balanced_similarity_gradient(torch.cat(views) @ torch.cat(views).T, temperature, alpha)
    close(by_similarity.sum(1), [2 / temperature * (1 - 2 * alpha) / 10] * 10)

    direction, step = torch.randn(10, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1e-5
    ahead, behind = (
        balanced(alpha, temperature, list((torch.cat(views) + s * direction).chunk(2))) for s in (step, -step)
    )
    slope = (found * direction).sum()
    assert abs((ahead - behind) / (2 * step) - slope) <= 1e-7 * (1 + abs(slope))


@few
@given(temperature=temperatures, seed=seeds, alpha=alphas)
def test_only_directions_matter(temperature, seed, alpha):
    """Through a normalisation: lengths change nothing, gradients are tangent and shrink with the length."""
    views = unit_views(seed)
    lengths = torch.linspace(0.5, 3, 10, dtype=torch.float64).view(2, 5, 1)

    def pulled(scale):
        leaf = (torch.stack(views) * scale).requires_grad_()
        total = balanced(alpha, temperature, list(F.normalize(leaf, dim=2)))
        return total.detach(), torch.autograd.grad(total, leaf)[0], leaf.detach()

    (total, g, z), (scaled_total, scaled_g, _) = pulled(1.0), pulled(lengths)
    close(scaled_total, total)
    close(scaled_g * lengths, g)
    close((z * g).sum(2), torch.zeros(2, 5))


@few
@given(seed=seeds, alpha=alphas, swap=st.lists(st.booleans(), min_size=5, max_size=5))
def test_views_may_be_swapped_image_by_image(seed, alpha, swap):
    z1, z2 = unit_views(seed)
    mask = torch.tensor(swap).unsqueeze(1)
    swapped = [torch.where(mask, z2, z1), torch.where(mask, z1, z2)]
    close(balanced(alpha, 0.3, swapped), balanced(alpha, 0.3, [z1, z2]))


@few
@given(temperature=temperatures, alpha=alphas, images=st.integers(1, 9))
def test_collapse(temperature, alpha, images):
    views = [F.normalize(torch.ones(images, 3, dtype=torch.float64), dim=1)] * 2
    expected = 2 * ((1 - 2 * alpha) / temperature + (1 - alpha) * math.log(2 * images - 1))
    close(balanced(alpha, temperature, views), expected)
    pull = gradient(lambda *v: balanced(alpha, temperature, list(v)), views)
    assert pull.abs().max() <= 1e-13


@few
@given(temperature=temperatures, alpha=alphas, images=st.integers(1, 9))
def test_orthogonal_images(temperature, alpha, images):
    views = [torch.eye(images, dtype=torch.float64)] * 2
    repel = math.log(math.exp(1 / temperature) + 2 * images - 2)
    close(balanced(alpha, temperature, views), 2 * (-alpha / temperature + (1 - alpha) * repel))


@few
@given(temperature=temperatures, alpha=st.floats(0.02, 1), images=st.integers(2, 6), seed=seeds, noise=st.floats(0, 2))
def test_never_below_the_minimum(temperature, alpha, images, seed, noise):
    least, _ = references.minimum(images, alpha, temperature)
    assert balanced(alpha, temperature, unit_views(seed, images, noise=noise)) >= least - 1e-12
    if alpha >= 0.5:
        simplex = F.normalize(torch.eye(images, dtype=torch.float64) - 1 / images, dim=1)
        close(balanced(alpha, temperature, [simplex, simplex]), least)


@pytest.mark.parametrize(
    ("alpha", "temperature", "similarity"), [(0.2, 0.5, 0.76949), (0.1, 0.2, 0.13046), (0.6, 0.5, 1.0)]
)
def test_free_embeddings_reach_the_minimum(alpha, temperature, similarity):
    least, a = references.minimum(8, alpha, temperature)
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
@given(temperature=temperatures, alpha=alphas, shift=st.floats(0, 3), seed=seeds)
def test_shift_of_all_similarities(temperature, alpha, shift, seed):
    """One more coordinate, sqrt(shift) in every row, adds ``shift`` to every similarity."""
    views = unit_views(seed)
    longer = [F.pad(view, (0, 1), value=math.sqrt(shift)) for view in views]
    change = balanced(alpha, temperature, longer) - balanced(alpha, temperature, views)
    close(change, 2 * (1 - 2 * alpha) * shift / temperature, 1e-11)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.45])
def test_positives_repel_once_they_are_easy(alpha):
    """The pull on a positive is (2 / tau) [(1 - alpha) p+ - alpha]: its sign flips at p+ = alpha / (1 - alpha)."""
    tau, images, turn = 0.5, 4, alpha / (1 - alpha)
    for share, sign in ((turn - 0.02, -1), (turn + 0.02, 1)):
        logit = math.log(share * (2 * images - 2) / (1 - share))  # others orthogonal, so p+ = e^l / (e^l + 2B - 2)
        s = tau * logit * torch.eye(2 * images, dtype=torch.float64).roll(images, 0)
        by_similarity = references.balanced_similarity_gradient(s, tau, alpha)
        assert by_similarity[0, images].sign() == sign
        if -1 < tau * logit < 1:  # and so it is for embeddings with these similarities
            pair = torch.tensor([[1.0, 0.0], [tau * logit, math.sqrt(1 - (tau * logit) ** 2)]], dtype=torch.float64)
            views = [torch.block_diag(*[row.unsqueeze(0)] * images) for row in pair]
            pull = gradient(lambda *v: balanced(alpha, tau, list(v)), views)[0, 0]
            assert (pull @ views[1][0]).sign() == sign


@few
@given(temperature=temperatures, alpha=alphas, seed=seeds)
def test_decoupled_is_smaller_by_the_positives(temperature, alpha, seed):
    views = unit_views(seed)
    z = torch.cat(views)
    p = (z @ z.T / temperature).fill_diagonal_(-math.inf).softmax(1)
    positive = p.gather(1, torch.arange(10).roll(5).unsqueeze(1))
    difference = DecoupledLoss(alpha=alpha, temperature=temperature)(*views).total - balanced(alpha, temperature, views)
    close(difference, 2 * (1 - alpha) * torch.log1p(-positive).mean())
    assert difference <= 0


@few
@given(temperature=temperatures, alpha=st.floats(0.01, 1), seed=seeds)
def test_the_papers_parametrisation(temperature, alpha, seed):
    """tau (loss - 2 (1 - alpha) log(2B - 1)) / (2 alpha) = -E s_p + lambda tau log mean exp(s / tau)."""
    views = unit_views(seed)
    ratio = (1 - alpha) / alpha
    z = torch.cat(views)
    mean = ((z @ z.T / temperature).fill_diagonal_(-math.inf).logsumexp(1) - math.log(9)).mean()
    paper = -(views[0] * views[1]).sum(1).mean() + ratio * temperature * mean
    total = balanced(alpha, temperature, views)
    close(temperature * (total - 2 * (1 - alpha) * math.log(9)) / (2 * alpha), paper, 1e-11)
    assert 1 / (1 + ratio) == pytest.approx(alpha)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_learned_temperature(alpha):
    """d total / d tau = -(2 / tau) mean [alpha A + (1 - alpha) sum_k p_ik s_ik / tau]."""
    views, tau = unit_views(3), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    total, attract, _ = BalancedLoss(alpha=alpha, temperature=tau)(*views)
    close(total, balanced(alpha, 0.2, views))
    s = torch.cat(views) @ torch.cat(views).T
    p = (s / 0.2).fill_diagonal_(-math.inf).softmax(1)
    expected = -2 / 0.2 * (alpha * attract + (1 - alpha) * (p * s).sum(1).mean() / 0.2)
    close(torch.autograd.grad(total, tau)[0], expected)


@few
@given(alpha=alphas, seed=seeds)
def test_limits_of_temperature(alpha, seed):
    views, hot, cold = unit_views(seed), 1e5, 1e-4
    z = torch.cat(views)
    off = (z @ z.T).fill_diagonal_(0).sum(1) / 9
    s = (views[0] * views[1]).sum(1).mean()
    limit = hot * (balanced(alpha, hot, views) - 2 * (1 - alpha) * math.log(9))
    close(limit, 2 * (-alpha * s + (1 - alpha) * off.mean()), 1e-4)
    hardest = (z @ z.T).fill_diagonal_(-math.inf).amax(1).mean()
    close(cold * balanced(alpha, cold, views), 2 * (-alpha * s + (1 - alpha) * hardest), 1e-3)


# Options of the balanced loss -----------------------------------------------------------------------------------------


def test_dot_similarity():
    views = [3 * view for view in unit_views(0)]
    close(balanced(0.5, 0.1, views, similarity="dot"), references.cross_entropy(views, 0.1))
    with pytest.raises(ValueError, match=r"similarity=dot has no minimum at alpha=0.6: .* type alpha=0.5, or"):
        BalancedLoss(alpha=0.6, temperature=0.5, similarity="dot")


def test_why_dot_similarity_is_refused():
    """alpha > 1/2: a constant embedding of growing length; alpha < 1/2: a growing simplex."""
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


def test_rescale_attract():
    views = unit_views(0)
    _, attract, repel = BalancedLoss(alpha=0.2, temperature=0.5)(*views)
    close(balanced(0.2, 0.5, views, rescale="attract"), attract + 4 * repel)
    with pytest.raises(ValueError, match="rescale=attract divides by alpha=0"):
        BalancedLoss(alpha=0, temperature=0.5, rescale="attract")


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds, count=st.integers(2, 3))
def test_rescale_to_a_constant_force(alpha, temperature, seed, count):
    """sum_k |d total_i / d s_ik| is NT-Xent's for every anchor i."""
    views = unit_views(seed, count=count)
    z = torch.cat(views)
    image = torch.arange(5).repeat(count)
    positive = (image.unsqueeze(0) == image.unsqueeze(1)).double() - torch.eye(len(z))
    p = (z @ z.T / temperature).fill_diagonal_(-math.inf).softmax(1)

    def pushes(a: float) -> Tensor:  # d total_i / d s_ik, up to 2 / tau
        return (1 - a) * p - a * positive / (count - 1)

    factors = pushes(0.5).abs().sum(1) / pushes(alpha).abs().sum(1)
    s = pushes(alpha) * factors.unsqueeze(1) * 2 / temperature / len(z)
    close(s.abs().sum(1), pushes(0.5).abs().sum(1) * 2 / temperature / len(z))
    expected = ((s + s.T) @ z).view(count, 5, 4)
    expected = expected - (expected * torch.stack(views)).sum(2, keepdim=True) * torch.stack(views)
    found = gradient(lambda *v: balanced(alpha, temperature, list(v), rescale="constant_force"), views)
    close(found, expected, 1e-11)
    half = BalancedLoss(alpha=0.5, temperature=temperature, rescale="constant_force")(*views)
    close(half.total, NTXentLoss(temperature=temperature)(*views).total)


# How the losses relate ------------------------------------------------------------------------------------------------


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds)
def test_decoupled_exceeds_nscl_by_the_mass_on_the_own_class(alpha, temperature, seed):
    views = unit_views(seed)
    z, image = torch.cat(views), torch.arange(5).repeat(2)
    label = LABELS[image]
    others = (z @ z.T / temperature).masked_fill(image.unsqueeze(0) == image.unsqueeze(1), -math.inf)
    mass = (others.softmax(1) * (label.unsqueeze(0) == label.unsqueeze(1))).sum(1)
    gap = (
        DecoupledLoss(alpha=alpha, temperature=temperature)(*views).total
        - NSCLLoss(alpha=alpha, temperature=temperature)(*views, labels=LABELS).total
    )
    close(gap, 2 * (1 - alpha) * -torch.log1p(-mass).mean())


@few
@given(alpha=alphas, temperature=temperatures, seed=seeds, count=st.integers(2, 3))
def test_supcon_exceeds_simclr_by_the_prototype_bias(alpha, temperature, seed, count):
    """By 2 alpha / tau times the unbiased estimate of E |mu_x - mu_y|^2, times the share of cross-image positives."""
    each, labels = 3, torch.tensor([0, 1, 0, 1, 1, 0])
    views = unit_views(seed, images=6, count=count)
    z = torch.stack(views)  # [V, B, P]
    within = (z.sum(0).square().sum(1) - count).mean() / (count * (count - 1))  # E <F, F'> of one image
    mean = z.mean(0)  # [B, P]
    members = [mean[labels == c] for c in (0, 1)]
    pairs = torch.stack([one.sum(0).square().sum() - one.square().sum() for one in members])
    across = pairs.mean() / (each * (each - 1))  # E <F, F'> of two images of one class
    share = count * (each - 1) / (count * each - 1)
    difference = (
        SupConLoss(alpha=alpha, temperature=temperature)(*views, labels=labels).total
        - balanced(alpha, temperature, views)
    )  # fmt: skip
    close(difference, 2 * alpha / temperature * share * (within - across))


@few
@given(temperature=temperatures, seed=seeds)
def test_uniformity_bounds_repulsion(temperature, seed):
    """R / tau <= L_uniform(1 / (2 tau)) + 1 / tau, in the mean over negatives, with equality where rows agree."""
    views = unit_views(seed)
    uniform = AlignUniformLoss(alpha=0.5, t=1 / (2 * temperature))(*views).repel
    mean = torch.stack([row_logsumexp(view, temperature) for view in views]).mean() - math.log(4)
    assert mean <= uniform + 1 / temperature + 1e-12
    simplex = F.normalize(torch.eye(5, dtype=torch.float64) - 1 / 5, dim=1)
    uniform = AlignUniformLoss(alpha=0.5, t=1 / (2 * temperature))(simplex, simplex).repel
    close(row_logsumexp(simplex, temperature).mean() - math.log(4), uniform + 1 / temperature)


def test_alignment_and_uniformity_are_the_metrics():
    views = unit_views(0)
    _, attract, repel = AlignUniformLoss(alpha=0.5, t=2.0)(*views)
    close(attract, metrics.alignment(*views))
    close(repel, torch.stack([metrics.uniformity(view) for view in views]).mean())


def test_only_infonce_bounds_mutual_information():
    """Two equiprobable images with one view each share log 2 nats; batches of six are enumerated."""
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


def test_special_cases():
    views = unit_views(1)
    simclr = NTXentLoss(temperature=0.5)(*views)
    close(DebiasedLoss(alpha=0.5, temperature=0.5, class_prior=0.0)(*views).total, simclr.total)
    hard = HardNegativeLoss(alpha=0.3, temperature=0.5, class_prior=0.1, hardness=0.0)(*views)
    assert hard == DebiasedLoss(alpha=0.3, temperature=0.5, class_prior=0.1)(*views)
    own = torch.arange(5)
    close(SupConLoss(alpha=0.5, temperature=0.5)(*views, labels=own).total, simclr.total)
    decoupled = DecoupledLoss(alpha=0.3, temperature=0.5)(*views)
    assert NSCLLoss(alpha=0.3, temperature=0.5)(*views, labels=own) == decoupled


def test_few_true_negatives_fall_to_the_floor():
    """Where the positive takes all of the mean away, g = exp(-1 / tau), with a gradient that is still finite."""
    z = torch.eye(5, dtype=torch.float64)
    loss = DebiasedLoss(alpha=0.5, temperature=0.2, class_prior=0.9)
    close(loss(z, z).repel, math.log(math.exp(5) + 8 * math.exp(-5)))
    assert gradient(lambda *v: loss(*v).total, [z, z]).isfinite().all()


# Running prototypes ---------------------------------------------------------------------------------------------------


def test_running_prototypes():
    loss = make("prototype", momentum=0.75)
    first, second = unit_views(1), unit_views(2)
    labels, later = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 2, 2, 2])
    batch = make("prototype")(*first, labels=labels)
    assert loss(*first, labels=labels) == batch  # nothing remembered yet
    assert loss(*first, labels=labels) == batch  # and a call remembers nothing
    loss.update(*first, labels=labels)

    def means(views, labels):
        return {c: torch.cat([view[labels == c] for view in views]).mean(0) for c in labels.unique().tolist()}

    old, new = means(first, labels), means(second, later)
    mu = torch.stack([0.75 * old[0] + 0.25 * new[0], old[1], new[2]])
    scores = torch.cat(second) @ mu.T / 0.2
    mine = later.repeat(2).unsqueeze(1)
    terms = loss(*second, labels=later)
    close(terms.attract, -scores.gather(1, mine).mean())
    close(terms.repel, scores.scatter(1, mine, -math.inf).amax(1).mean())

    restored = make("prototype", momentum=0.75)
    restored.load_state_dict(loss.state_dict())
    assert restored(*second, labels=later) == terms
    loss.update(*second, labels=later)
    running, seen = loss.running
    close(running[:3], mu)
    assert seen.tolist() == [True, True, True, False]

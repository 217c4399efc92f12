"""What every loss of conf/loss must do.

The tests find the losses by their YAML files. A new loss also adds tests/references/<name>.py, which
``references/__init__.py`` describes, and edits no test.
"""

import importlib.util
import inspect
import math
import re
import typing
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from loss_helpers import LABELS, Largest, alphas, close, few, gradient, seeds, unit_views
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scclr.config.build import build, find_component
from scclr.config.compose import conf_dir
from scclr.losses import GlobalBatch, Loss, LossTerms


@cache
def yaml_arguments(name: str) -> dict[str, Any]:
    """Those of conf/loss/<name>.yaml, with a balance of 0.5."""
    whole = OmegaConf.create({"alpha": 0.5, "loss": OmegaConf.load(conf_dir() / "loss" / f"{name}.yaml")})
    return OmegaConf.to_container(whole, resolve=True)["loss"]


class Case(NamedTuple):
    """A loss of conf/loss, and the arguments in which it differs from its YAML file."""

    name: str
    changes: dict[str, Any]

    def arguments(self) -> dict[str, Any]:
        """Those of the YAML file, but a temperature that makes gradients large, and the changes."""
        node = yaml_arguments(self.name)
        return node | ({"temperature": 0.2} if "temperature" in node else {}) | self.changes

    def loss(self, alpha: float = 0.5, **changes: Any) -> Loss:
        arguments = self.arguments()
        return build("loss", arguments | ({"alpha": alpha} if "alpha" in arguments else {}) | changes, classes=4)

    @property
    def constructor(self) -> type[Loss]:
        return find_component("loss", self.arguments())

    @property
    def hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.constructor.__init__)

    def constructor_arguments(self) -> dict[str, Any]:
        known = self.arguments() | {"classes": 4}
        return {name: known[name] for name in inspect.signature(self.constructor).parameters if name in known}

    def with_and_without_overflow(self) -> list[Loss]:
        """The loss, and one at a temperature so low that its exponentials overflow even in float64."""
        return [self.loss()] + ([self.loss(temperature=1e-3)] if "temperature" in self.arguments() else [])


def reference(name: str) -> ModuleType | None:
    exists = importlib.util.find_spec(f"references.{name}") is not None
    return importlib.import_module(f"references.{name}") if exists else None


NAMES = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))
CASES = [Case(name, changes) for name in NAMES for changes in [{}, *getattr(reference(name), "VARIANTS", [])]]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}{case.changes or ''}")


def total(loss: Loss, labels: Tensor = LABELS):
    return lambda *views: loss(*views, labels=labels).total


@every_loss
@pytest.mark.parametrize(("count", "alpha"), [(2, 0.5), (2, 0.2), (3, 0.7)])
def test_value_and_gradient_are_the_papers(case, count, alpha):
    paper = reference(case.name)
    assert paper is not None, f"write the paper's terms of loss={case.name} in tests/references/{case.name}.py"
    arguments = {key: value for key, value in case.arguments().items() if key not in ("_target_", "alpha")}
    alpha = alpha if "alpha" in case.arguments() else 0.5
    views, loss = unit_views(1, count=count), case.loss(alpha)

    def expected(*views: Tensor) -> LossTerms:
        attract, repel = paper.terms(list(views), LABELS, **arguments)
        return LossTerms(2 * (alpha * attract + (1 - alpha) * repel), attract, repel)

    for found, wanted in zip(loss(*views, labels=LABELS), expected(*views), strict=True):
        close(found, wanted)
    close(gradient(total(loss), views), gradient(lambda *v: expected(*v).total, views), 1e-11)


@every_loss
def test_value_and_gradient_do_not_depend_on_the_tile(case, monkeypatch):
    """The default tile is larger than the batch of any test."""
    views, labels = unit_views(2, images=60), torch.arange(60) % 4
    loss = case.loss(0.4)
    expected = [*loss(*views, labels=labels), gradient(total(loss, labels), views)]
    monkeypatch.setattr("scclr.losses.pairs.tile_of", lambda device: 7)
    found = [*loss(*views, labels=labels), gradient(total(loss, labels), views)]
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@every_loss
def test_memory_is_linear_in_the_batch(case, monkeypatch):
    monkeypatch.setattr("scclr.losses.pairs.tile_of", lambda device: 16)
    views, labels = [view.requires_grad_() for view in unit_views(2, images=100)], torch.arange(100) % 4
    half = GlobalBatch(tuple(views), labels, 50)
    for loss in case.with_and_without_overflow():
        with Largest() as largest:
            loss(*views, labels=labels).total.backward()
            loss(*(view[50:] for view in views), labels=labels[50:], global_batch=half).total.backward()
        assert largest.elements == 200 * 4  # the embeddings; never 200 * 200 or 100 * 100
    with Largest() as largest:
        torch.cat(views) @ torch.cat(views).T
    assert largest.elements == 200 * 200


@every_loss
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_over_processes_is_the_loss_of_one_process(case, alpha, count):
    views, labels, processes = unit_views(3, images=6, count=count), torch.tensor([2, 0, 2, 1, 0, 0]), 3
    loss = case.loss(alpha)

    def over_processes(term: str):
        def mean(*views: Tensor) -> Tensor:
            everything, parts = GlobalBatch(views, labels, 0), []
            for start in range(0, 6, 2):
                local = (view[start : start + 2] for view in views)
                own = labels[start : start + 2]
                terms = loss(*local, labels=own, global_batch=everything._replace(start=start))
                parts.append(getattr(terms, term))
            return torch.stack(parts).sum() / processes

        return mean

    def one_process(term: str):
        return lambda *views: getattr(loss(*views, labels=labels), term)

    for term in LossTerms._fields:
        close(over_processes(term)(*views), one_process(term)(*views))
        close(gradient(over_processes(term), views), gradient(one_process(term), views))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computation_is_in_float32_or_wider(case, dtype):
    for loss in case.with_and_without_overflow():
        views = [view.to(dtype).requires_grad_() for view in unit_views(4)]
        terms = loss(*views, labels=LABELS)
        assert {term.dtype for term in terms} == {torch.float32}
        for found, wanted in zip(terms, loss(*[view.double() for view in views], labels=LABELS), strict=True):
            close(found.detach(), wanted.detach(), 1e-5)
        wide = [view.detach().float().requires_grad_() for view in views]
        exact = torch.autograd.grad(loss(*wide, labels=LABELS).total, wide)
        for found, wanted in zip(torch.autograd.grad(terms.total, views), exact, strict=True):
            assert torch.equal(found, wanted.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(*views, labels=LABELS) == terms


@every_loss
@pytest.mark.parametrize("kind", ["identical", "antipodal", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_arguments_in_range_give_finite_values(case, kind, dtype):
    z = unit_views(5)[0]
    z1, z2 = {"identical": (z[:1].expand(5, -1),) * 2, "antipodal": (z, -z), "aligned": (z, z)}[kind]
    views = [z1.to(dtype), z2.to(dtype)]
    losses = [case.loss()]
    for name in [name for name, kind in case.hints.items() if kind is float and name != "alpha"]:
        for value in (1e-6, 0.01, 1e6):
            with suppress(ValueError):  # out of range for this argument
                losses.append(case.constructor(**case.constructor_arguments() | {name: value}))
    for loss in losses:
        assert all(term.isfinite() for term in loss(*views, labels=LABELS))
        assert gradient(total(loss), views).isfinite().all()


@every_loss
def test_nan_reaches_the_total_and_zero_rows_give_none(case):
    z1, z2 = unit_views(6)
    assert case.loss()(torch.zeros_like(z1), z2, labels=LABELS).total.isfinite()
    z1[0, 0] = math.nan
    assert case.loss()(z1, z2, labels=LABELS).total.isnan()


@every_loss
def test_permuted_images_permute_the_gradient_and_views_may_be_swapped(case):
    views, loss, order = unit_views(7), case.loss(0.3), torch.tensor([3, 1, 4, 0, 2])
    value = loss(*views, labels=LABELS).total
    close(loss(*(view[order] for view in views), labels=LABELS[order]).total, value)
    close(loss(*views[::-1], labels=LABELS).total, value)
    permuted = gradient(total(loss, LABELS[order]), [view[order] for view in views])
    close(permuted, gradient(total(loss), views)[:, order])


@every_loss
def test_rotations_of_all_rows_change_nothing(case):
    """So no gradient rotates all rows together: sum_i z_i g_i^T is symmetric."""
    views, loss = unit_views(8), case.loss(0.3)
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    close(loss(*(view @ q for view in views), labels=LABELS).total, loss(*views, labels=LABELS).total)
    rotation = torch.cat(views).T @ gradient(total(loss), views).flatten(0, 1)  # [P, P]
    close(rotation, rotation.T)


@pytest.mark.parametrize("case", [case for case in CASES if "alpha" in case.arguments()], ids=lambda case: case.name)
@few
@given(alpha=alphas, seed=seeds)
def test_alpha_weighs_terms_that_do_not_depend_on_it(case, alpha, seed):
    views = unit_views(seed)
    value, attract, repel = case.loss(alpha)(*views, labels=LABELS)
    close(value, 2 * (alpha * attract + (1 - alpha) * repel))
    assert case.loss(0.25)(*views, labels=LABELS)[1:] == (attract, repel)


@every_loss
def test_a_call_waits_for_no_device_and_mixes_none(case):
    for loss in case.with_and_without_overflow():
        empty = [torch.empty(5, 4, device="meta", requires_grad=True) for _ in range(2)]
        loss(*empty, labels=torch.empty(5, dtype=torch.int64, device="meta")).total.backward()
        assert empty[0].grad.shape == (5, 4)
        with FakeTensorMode(allow_non_fake_inputs=True):  # a fake GPU has no values: waiting for one raises
            views = [torch.empty(5, 4, device="cuda") for _ in range(2)]
            labels = torch.empty(5, dtype=torch.int64, device="cuda")
            everything = GlobalBatch(tuple(views), labels, 2)
            terms = loss(*views, labels=labels)
            terms += loss(*(view[2:] for view in views), labels=labels[2:], global_batch=everything)
            assert {term.device.type for term in terms} == {"cuda"}


@every_loss
def test_shapes_that_do_not_fit_are_refused(case):
    loss, (z1, z2) = case.loss(), unit_views(0)
    for views in ([z1], [z1, z2[:3]], [z1[0], z2[0]], [z1[:0], z2[:0]]):
        with pytest.raises(ValueError, match="views have shapes"):
            loss(*views, labels=LABELS)
    with pytest.raises(ValueError, match=r"global_batch\.start=4: 2 images from there do not fit among 5"):
        loss(z1[:2], z2[:2], labels=LABELS[:2], global_batch=GlobalBatch((z1, z2), LABELS, 4))
    with pytest.raises(ValueError, match=r"global_batch\.views must be 2 of one shape \[G, 4\]"):
        loss(z1, z2, labels=LABELS, global_batch=GlobalBatch((z1,), LABELS, 0))


@every_loss
def test_only_supervised_losses_read_labels(case):
    loss, views = case.loss(), unit_views(0)
    if not loss.supervised:
        assert loss(*views) == loss(*views, labels=LABELS)
        return
    with pytest.raises(ValueError, match="a supervised loss needs labels"):
        loss(*views)
    for labels in (LABELS[:3], LABELS.double()):
        with pytest.raises(ValueError, match=r"labels are .*: give int64 \[5\]"):
            loss(*views, labels=labels)
    with pytest.raises(ValueError, match=r"a supervised loss needs global_batch\.labels"):
        loss(*views, labels=LABELS, global_batch=GlobalBatch(tuple(views), None, 0))


@every_loss
def test_one_image_is_refused_or_defined(case):
    views, loss, labels = unit_views(0, images=1), case.loss(), torch.tensor([0])
    if loss.least_images == 2:
        with pytest.raises(ValueError, match="needs 2 images or more, not 1"):
            loss(*views, labels=labels)
    elif loss.supervised:  # without another class R may be -inf
        assert not loss(*views, labels=labels).total.isnan()
    else:
        assert loss(*views, labels=labels).total.isfinite()


@every_loss
def test_the_form_of_the_repulsion_is_that_of_the_loss(case):
    """R = mean_i log sum_k exp(s_ik / tau) over all other views, or over those of other images if ``decoupled``."""
    loss, views = case.loss(), unit_views(0)
    if (form := loss.logsumexp_form()) is not None:
        z, image = torch.cat(views), torch.arange(5).repeat(2)
        own = image.unsqueeze(0) == image.unsqueeze(1) if form.decoupled else torch.eye(10, dtype=torch.bool)
        close(loss(*views, labels=LABELS).repel, (z @ z.T / form.temperature)[~own].view(10, -1).logsumexp(1).mean())


def test_thresholds_are_known_of_three_losses():
    assert {case.name for case in CASES if case.loss().logsumexp_form() is not None} == {
        "balanced",
        "decoupled",
        "ntxent",
    }


@every_loss
def test_arguments_out_of_range_are_refused(case):
    """A float refuses NaN, infinity and absurd numbers, a choice unknown words, and a count negative numbers."""
    bad = {float: [math.nan, math.inf, -math.inf, 1e30, -1e30], str: ["unknown"], int: [-1]}
    more = {"alpha": [-0.1, 1.1], "temperature": [0.0, -1.0, 1e-30]}
    for name in case.constructor_arguments():
        for wrong in bad.get(case.hints[name], []) + more.get(name, []):
            with pytest.raises(ValueError, match=re.escape(f"{name}={wrong}")):
                case.constructor(**case.constructor_arguments() | {name: wrong})

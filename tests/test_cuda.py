"""What must hold on a GPU, beside what the CPU computes: losses, views, steps, and what they take.

    pytest -m cuda -n 4 --dist load                              on a machine with one GPU and four cores or more
    SCCLR_TEST_DEVICE=cpu pytest -m cuda                         the same tests, in small, on the CPU

Whole runs and their processes are in ``test_cuda_runs.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import compose
from cuda_helpers import (
    CUDA,
    DEVICE,
    MARKS,
    alone,
    card,
    coloured,
    near,
    parts,
    peak_bytes,
    recompilations,
    seconds_of,
    sized,
    synchronize,
    trained,
)
from torch import Tensor, nn

from scclr.components import make_augment, make_loss
from scclr.config.compose import conf_dir
from scclr.datasets.loader import Batch
from scclr.encoders.model import Model
from scclr.losses.pairs import row_logsumexp, tile_of
from scclr.pretrain import optim
from scclr.pretrain.loop import train_step
from scclr.pretrain.metrics import embedding_metrics
from scclr.pretrain.state import TrainState

pytestmark = MARKS
__all__ = ["alone", "card"]

LOSSES = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (conf_dir() / "augment").glob("*.yaml"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_cpu_in_float64(name: str, precision: str) -> None:
    dtype, draw = DTYPES[precision], torch.Generator().manual_seed(0)
    image = torch.randn(1, 512, 64, generator=draw)
    views = F.normalize(image + 0.7 * torch.randn(2, 512, 64, generator=draw), dim=2).to(dtype)
    labels = torch.randint(10, (512,), generator=draw)
    loss = make_loss(compose(f"loss={name}"), classes=10)
    there, here = views.to(DEVICE, copy=True).requires_grad_(), views.double().requires_grad_()
    terms, wanted = loss(*there, labels=labels.to(DEVICE)), loss(*here, labels=labels)
    for term, value, of_cpu in zip(terms._fields, terms, wanted, strict=True):
        torch.testing.assert_close(value.cpu().double(), of_cpu, rtol=1e-5, atol=1e-5, msg=f"{term} of {name}")
    scale = 2.0**10  # as for float16 in training, where gradients this small would have few digits
    (terms.total * scale).backward()
    (wanted.total * scale).backward()
    assert there.grad is not None
    assert here.grad is not None
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # of the gradient in the dtype of the views
    near(there.grad, here.grad, 1e-5 + rounding, name)


KERNELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "running maximum": {"unit": False},
    "period": {"period": 0.5},  # of the rows
    "ids": {"ids": True},
    "keys": {"keys": True},
    "keys and ids": {"keys": True, "ids": True, "unit": False},
}


@pytest.mark.parametrize("tile", [None, 1024])
@pytest.mark.parametrize("rows", sized([1024, 5000, 16384], [200, 1500]))
@pytest.mark.parametrize("kind", list(KERNELS))
def test_the_pair_kernel_is_exact_in_little_memory(kind: str, rows: int, tile: int | None) -> None:
    options, draw, width = KERNELS[kind], torch.Generator().manual_seed(0), 128
    z = F.normalize(torch.randn(rows, width, generator=draw), dim=1).to(DEVICE)
    w = torch.rand(rows, generator=draw).to(DEVICE)
    keys = F.normalize(torch.randn(rows // 2, width, generator=draw), dim=1).to(DEVICE) if "keys" in options else None
    ids = torch.randint(50, (rows,), generator=draw).to(DEVICE) if "ids" in options else None
    key_ids = (
        torch.randint(50, (rows // 2,), generator=draw).to(DEVICE) if keys is not None and "ids" in options else None
    )
    period = round(options["period"] * rows) if "period" in options else None
    leaves = [x.clone().requires_grad_() for x in (z, keys) if x is not None]

    def both_passes() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        found = row_logsumexp(
            leaves[0], 0.1, period=period, ids=ids, keys=leaves[1] if keys is not None else None, key_ids=key_ids,
            unit=options.get("unit", True), tile=tile,
        )  # fmt: skip
        found.backward(w)
        return found.detach()

    found = both_passes()  # also allocates what cuBLAS keeps
    wanted, of_rows, of_keys = dense_logsumexp(z, keys, w, 0.1, period=period, ids=ids, key_ids=key_ids)
    near(found, wanted, 1e-5, "values")
    near(leaves[0].grad, of_rows, 1e-5, "gradient of the rows")  # type: ignore[arg-type]
    if keys is not None:
        near(leaves[1].grad, of_keys, 1e-5, "gradient of the keys")  # type: ignore[arg-type]
    side = min(tile or tile_of(DEVICE), rows)
    assert peak_bytes(both_passes) <= 6 * 4 * side**2 + 12 * 4 * rows * width + 100 * rows


def dense_logsumexp(
    z: Tensor,
    keys: Tensor | None,
    w: Tensor,
    temperature: float,
    *,
    period: int | None,
    ids: Tensor | None,
    key_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's values and its gradients in float64, with all similarities of 1,024 rows in memory at a time."""
    rows = z.double().requires_grad_()
    others = rows if keys is None else keys.double().requires_grad_()
    values, number = [], torch.arange(len(z), device=z.device)
    for block in number.split(1024):
        logits = rows[block] @ others.T / temperature
        left_out = torch.zeros_like(logits, dtype=torch.bool)
        if keys is None:
            left_out |= (block.unsqueeze(1) - number) % (period or len(z)) == 0
        if ids is not None:
            left_out |= ids[block].unsqueeze(1) == (ids if key_ids is None else key_ids)
        value = logits.masked_fill(left_out, -torch.inf).logsumexp(1)
        (value * w[block]).sum().backward()
        values.append(value.detach())
    assert rows.grad is not None
    assert others.grad is not None
    return torch.cat(values), rows.grad, others.grad


# ------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*RECIPES, "everything"])
def test_views_are_those_of_the_cpu(name: str, channels: int, exact: bool) -> None:
    words = ["augment=simclr", "augment.rotation=20", "augment.blur=0.5", "augment.solarize=0.3"]
    augment = make_augment(compose(*(words if name == "everything" else [f"augment={name}"]), f"augment.exact={exact}"))
    images = coloured(24).images[:, :channels].contiguous()
    for step in range(3):
        found = augment(images, seed=3, step=step)
        wanted = augment(images.cpu(), seed=3, step=step)
        assert found.device.type == DEVICE.type
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=2e-5)
        part = augment(images[8:16], seed=3, step=step, first=8, total=24)
        torch.testing.assert_close(part, found.unflatten(0, (-1, 24))[:, 8:16].flatten(0, 1), rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- steps


class Steps:
    """Steps of training, one at a time, on a batch that is on the device already."""

    def __init__(self, *words: str, batch_size: int, micro_batch: int | None = None) -> None:
        config, self.state, self.augment = parts(f"pretrain.batch_size={batch_size}", *words)
        data = coloured(batch_size)
        self.batch, self.options = Batch(data.images, data.labels), config.pretrain  # type: ignore[arg-type]
        self.micro_batch, self.state.model = micro_batch, self.state.model.train()

    def __call__(self) -> Tensor:
        _, z = train_step(
            self.state, self.state.model, self.augment, self.batch,
            seed=0, dtype=DTYPES[self.options.precision], memory_format=torch.channels_last,
            micro_batch=self.micro_batch,
        )  # fmt: skip
        self.state.step += 1
        return z


STEPS = {
    "bf16": ["pretrain.precision=bf16"],
    "fp32, SGD": ["pretrain.precision=fp32", "optimizer=sgd"],
    "LARS": ["pretrain.precision=bf16", "optimizer=lars"],
    "fp16": ["pretrain.precision=fp16"],
    "supcon": ["pretrain.precision=bf16", "loss=supcon"],
    "exact colours": ["pretrain.precision=bf16", "augment.exact=true"],
    "blur": ["pretrain.precision=bf16", "augment.blur=0.5", "augment.solarize=0.2"],
}


@pytest.mark.parametrize("micro_batch", [None, sized(96, 6)])
@pytest.mark.parametrize("kind", list(STEPS))
def test_a_step_never_waits_for_the_device(kind: str, micro_batch: int | None) -> None:
    """PyTorch raises an error where it would wait."""
    if kind == "fp16" and not CUDA:
        pytest.skip("float16 needs CUDA")
    step = Steps(*STEPS[kind], batch_size=sized(256, 16), micro_batch=micro_batch)
    for _ in range(3):
        step()
    synchronize()
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["bf16", "fp32, SGD"])
def test_a_step_returns_while_the_device_is_busy(kind: str) -> None:
    """The host launches a step in at most 50 ms, while the device still has 200 ms of other work before it."""
    step = Steps(*STEPS[kind], batch_size=sized(256, 16))
    for _ in range(5):
        step()
    taken = []
    for _ in range(3):  # the best of three: the host may be busy with something else
        synchronize()
        if CUDA:
            torch.cuda._sleep(400_000_000)  # cycles: 200 ms at 2 GHz
        taken.append(seconds_of(step))
        done = torch.cuda.current_stream().query() if CUDA else False
        assert not done, "the device was not busy for long enough: this test says nothing"
    if CUDA:
        assert min(taken) < 0.05, taken


def test_the_metrics_of_a_batch_are_those_of_the_cpu() -> None:
    config, state, _ = parts()
    z = F.normalize(torch.randn(2, sized(512, 32), 128, generator=torch.Generator().manual_seed(0)), dim=2).to(DEVICE)
    labels = torch.zeros(z.shape[1], dtype=torch.int64, device=DEVICE)
    first = embedding_metrics(state.loss, z, labels)
    on_cpu = embedding_metrics(make_loss(config, classes=10), z.cpu(), labels.cpu())
    assert first == pytest.approx(on_cpu, rel=1e-3, abs=1e-4)


class Plain(nn.Module):
    """Two convolutions without batch normalization, which would see the parts of a batch."""

    feature_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 16, 3, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def gradients(micro_batch: int | None, precision: str, loss: str, scale: float | None = None) -> TrainState:
    """The state after one step of SGD with a rate of zero, which leaves the gradients where they are."""
    step = Steps(f"loss={loss}", "projector.batch_norm=false", f"pretrain.precision={precision}", batch_size=64)
    torch.manual_seed(0)
    config = compose("projector.batch_norm=false", "projector.hidden_dim=32", "projector.out_dim=16")
    model = Model(Plain(), config.projector, [0.5] * 3, [0.25] * 3).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16", init_scale=scale or 2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9 if scale is None else 1.0)
    step.state, step.micro_batch = TrainState(model, step.state.loss, optimizer, scaler), micro_batch
    step()
    return step.state


@pytest.mark.parametrize("loss", ["balanced", "supcon", "sigmoid"])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_parts_of_a_batch_have_the_gradient_of_the_whole(precision: str, loss: str) -> None:
    whole, of_parts = (gradients(size, precision, loss).model for size in (None, 24))
    for (name, p), q in zip(whole.named_parameters(), of_parts.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        error = (p.grad - q.grad).norm() / p.grad.norm()
        assert error < (1e-4 if precision == "fp32" else 2e-2), f"{name}: {error:.1e}"


@pytest.mark.parametrize("micro_batch", [None, 24])
def test_a_float16_gradient_that_overflows_skips_the_step(micro_batch: int | None) -> None:
    torch.manual_seed(0)
    before = [p.clone() for p in Plain().parameters()]
    state = gradients(micro_batch, "fp16", "balanced", scale=2.0**60)
    assert state.scaler.get_scale() == 2.0**59
    for p, older in zip(state.model.encoder.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach().cpu(), older, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- compilation, precision


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("exact", "how"), [(True, "true"), (False, "true"), (False, sized("graphs", "true"))])
def test_compiled_steps_train_alike(exact: bool, how: str) -> None:
    words = [f"pretrain.batch_size={sized(256, 16)}", "pretrain.log_every=1", f"augment.exact={exact}"]
    words += ["pretrain.precision=fp32", "optimizer=sgd", "optimizer.lr=0.01"]  # Adam's first steps enlarge rounding
    plain = trained(20, *words, "pretrain.compile=false")
    with recompilations() as again:
        compiled = trained(20, *words, f"pretrain.compile={how}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(again) <= 2, again
    for row, wanted in zip(compiled, plain, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=3e-2), row["step"]  # on an H200 0.011 apart by step 8


@pytest.mark.usefixtures("fresh_compiler")
def test_many_trainings_of_one_process_are_compiled() -> None:
    """Each point of a sweep is, whatever the points before it compiled."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for exact in (True, False):
            words = [f"pretrain.batch_size={sized(256, 16)}", f"augment.exact={exact}", "pretrain.compile=true"]
            assert trained(2, *words)[-1]["loss"] > 0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("exact", [True, False])
def test_compiled_views_are_those_of_the_cpu(exact: bool) -> None:
    augment = make_augment(compose("augment=simclr", "augment.blur=0.5", f"augment.exact={exact}"))
    images = coloured(24).images
    for step in range(3):
        found = augment.compiled()(images, seed=3, step=step)
        torch.testing.assert_close(found.cpu(), augment(images.cpu(), seed=3, step=step), rtol=0, atol=2e-5)


def test_bfloat16_trains_like_float32() -> None:
    steps, words = sized(100, 20), [f"pretrain.batch_size={sized(256, 16)}", "pretrain.log_every=10"]
    words += ["pretrain.compile=false"]
    full = trained(steps, *words, "pretrain.precision=fp32")
    half = trained(steps, *words, "pretrain.precision=bf16")
    assert full[-1]["loss"] < 0.99 * full[0]["loss"], "it learns"
    for row, wanted in zip(half, full, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=0.02), row["step"]


def test_activations_keep_their_channels_last() -> None:
    step = Steps("pretrain.precision=bf16", batch_size=sized(256, 16))
    layouts: list[tuple[str, bool]] = []
    for name, module in step.state.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, x, name=name: layouts.append((name, x[0].is_contiguous(memory_format=torch.channels_last)))  # type: ignore[misc]
            )
    for _ in range(3):
        step()
    assert layouts
    assert all(last for _, last in layouts), [name for name, last in layouts if not last]


@pytest.mark.skipif(not CUDA, reason="the CPU converts layouts within its convolutions")
def test_only_the_first_convolution_converts_a_layout() -> None:
    step = Steps("pretrain.precision=bf16", batch_size=256)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize()
    kernels = {event.key: event.count for event in profile.key_averages()}
    if len(kernels) < 10:
        pytest.skip("the profiler sees no kernels on this machine")
    converting = {name: n for name, n in kernels.items() if "nchwToNhwc" in name or "nhwcToNchw" in name}
    # For the first convolution, of three channels, cuDNN may choose a kernel that converts its input and its output.
    assert sum(converting.values()) <= 2, converting


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_an_optimizer_steps_as_on_the_cpu(name: str) -> None:
    config = compose(f"optimizer={name}")
    values = {key: value for key, value in config.optimizer.items() if key != "_target_"}
    models = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 10)).to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer, draw = getattr(optim, name)(model=model, batch_size=256, **values), torch.Generator().manual_seed(1)
        for step in range(10):
            optim.set_lr(optimizer, optim.lr_factor(step, 10, 2))
            for p in model.parameters():
                gradient = torch.randn(p.shape, generator=draw)
                p.grad = gradient.to(device).contiguous(
                    memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
                )
            optimizer.step()
        models.append(model)
    for p, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.detach().cpu(), wanted.detach(), rtol=1e-5, atol=1e-5)

"""The loop: order, precision, devices, gradient caching, and the step that is not finite."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, compose, noise, training
from torch.nn.parallel import DistributedDataParallel

from scclr.augment import Augment
from scclr.components import check
from scclr.config.compose import conf_dir
from scclr.config.errors import UserError
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet
from scclr.datasets.loader import Batch, epoch_order
from scclr.losses import LossTerms
from scclr.pretrain.loop import compiles, precision_dtype, pretrain, train_step, without_synchronization
from scclr.pretrain.state import LossWindow, TrainState
from scclr.run.checkpoint import Checkpoints
from scclr.run.preemption import CheckpointSchedule, Stop
from scclr.run.tracking import Log

LOSSES = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))


class Rows(Log):
    """A log that keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})


def train(config: TrainConfig, data: ImageSet, state: TrainState | None = None) -> list[dict[str, float]]:
    """The rows of a whole training that writes no checkpoint."""
    fresh, augment = training(config)
    never = CheckpointSchedule(steps=None, seconds=None, total=-1, stop=Stop())
    log = Rows()
    pretrain(
        state or fresh, data, augment, config.pretrain, seed=config.seed, alpha=None,
        checkpoints=Checkpoints(None, never, {}), log=log,  # type: ignore[arg-type]
        evaluations=[(config.pretrain.knn_every, lambda: {"knn": 0.5})],
    )  # fmt: skip
    return log.rows


def test_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    order = epoch_order(0, 3, 100)
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, epoch_order(0, 4, 100))
    assert not torch.equal(order, epoch_order(1, 3, 100))
    assert torch.equal(order, epoch_order(0, 3, 100))


def test_rows_and_learning_rate() -> None:
    rows = train(compose(*TINY, "pretrain.batch_size=32"), noise(100))  # 3 steps an epoch, 3 of warm-up
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert ["knn" in row for row in rows] == [False, True, False, True]
    assert rows[1]["epoch"] == 1
    assert rows[1]["lr"] == pytest.approx(0.002 * 3 / 4)


def test_a_step_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(*TINY, "pretrain.log_every=5", "pretrain.knn_every=0")
    state, _ = training(config)
    plain, calls = state.loss.terms, []

    def spoiled(anchors: Any) -> LossTerms:
        calls.append(0)
        total, attract, repel = plain(anchors)
        return LossTerms(total * (math.inf if len(calls) == 4 else 1), attract, repel)

    monkeypatch.setattr(state.loss, "terms", spoiled)
    with pytest.raises(UserError, match="not finite at step 3"):
        train(config, noise(200), state)


@pytest.mark.parametrize("loss", ["nscl", "prototype"])
def test_a_batch_of_one_class_is_blamed_where_only_other_classes_repel(loss: str) -> None:
    with pytest.raises(UserError, match=r"step 0, where no image .* of another class: type a larger pretrain\.batch_s"):
        train(compose(*TINY, f"loss={loss}"), noise(200))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_checkpoint_of_another_run_does_not_fit(optimizer: str) -> None:
    config = compose(*TINY, f"optimizer={optimizer}")
    state, _ = training(config)
    train(config, noise(200), state)
    saved = state.state_dict()
    training(config)[0].load_state_dict(saved)
    moments = {key: dict.fromkeys(kept, torch.zeros(2)) for key, kept in saved["optimizer"]["state"].items()}
    other = training(compose(*TINY, "encoder.widths=[8]"))[0].state_dict()
    for changes in (
        {"optimizer": {**saved["optimizer"], "state": moments}},
        {"optimizer": {**saved["optimizer"], "param_groups": []}},
        {"model": other["model"]},
        {"loss": {"weight": torch.zeros(1)}},
    ):
        with pytest.raises(UserError, match=r"^the checkpoint does not fit this run \([^\n]+\): type overwrite=true"):
            training(config)[0].load_state_dict({**saved, **changes})


@pytest.mark.parametrize("cut_at", [0, 2])  # 0: a checkpoint right after a row
def test_a_window_cut_by_a_checkpoint_gives_the_same_row(cut_at: int) -> None:
    terms = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    first, second = LossWindow(begin=7), LossWindow(begin=7 + cut_at)
    for row in terms[:cut_at]:
        first.add(LossTerms(*row))
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    for row in terms[cut_at:]:
        second.add(LossTerms(*row))
    means = second.means(12, batch_size=4)
    for value, name in zip(terms.double().mean(0).tolist(), ("loss", "attract", "repel"), strict=True):
        assert means[name] == pytest.approx(value, rel=1e-12)


def one_step(
    state: TrainState, augment: Augment, batch: Batch, micro_batch: int | None = None
) -> tuple[LossTerms, torch.Tensor]:
    return train_step(
        state, state.model, augment, batch,
        seed=0, dtype=torch.float32, memory_format=torch.channels_last, micro_batch=micro_batch,
    )  # fmt: skip


def test_gradient_caching_with_batch_norm_normalizes_parts_once() -> None:
    """The running statistics move once a part: the pass without a graph leaves them as they are."""
    config, data = compose(*TINY, "optimizer=sgd"), noise(12)
    state, augment = training(config)
    fresh, _ = training(config)
    state.model.double()
    one_step(state, augment, Batch(data.images, data.labels), micro_batch=4)
    norm, moved = (s.model.encoder.layers.norm for s in (fresh, state))
    fresh.model.double().train()
    with torch.no_grad():
        for first in (0, 4, 8):
            part = data.images[first : first + 4]
            fresh.model(augment(part, seed=0, step=0, first=first, total=12).double())
    torch.testing.assert_close(moved.running_mean, norm.running_mean)
    torch.testing.assert_close(moved.running_var, norm.running_var)
    assert moved.num_batches_tracked == norm.num_batches_tracked == 3


@pytest.mark.parametrize(("channels", "micro_batch", "crops"), [(1, None, False), (3, None, False), (3, 6, True)])
@pytest.mark.parametrize(
    ("optimizer", "loss"), [("sgd", "balanced"), ("lars", "balanced"), *(("adamw", loss) for loss in LOSSES)]
)
def test_a_whole_step_stays_on_its_device(
    optimizer: str, loss: str, channels: int, micro_batch: int | None, crops: bool
) -> None:
    """On the meta device an operation that mixes devices fails, and so does one that waits for a value."""
    config = compose(
        *TINY, f"optimizer={optimizer}", f"loss={loss}", "augment=simclr", "augment.blur=0.5",
        f"augment.rotation={0 if crops else 10}", "augment.solarize=0.5", "augment.views=[{},{},{jitter: 0}]",
    )  # fmt: skip
    with torch.device("meta"):
        state, augment = training(config, channels)
        images = torch.empty(16, *([3] if crops else []), channels, 8, 8, dtype=torch.uint8)  # 3 views
        batch = Batch(images, torch.empty(16, dtype=torch.int64))
    terms, z = one_step(state, augment, batch, micro_batch)
    assert z.device.type == "meta"
    assert all(term.device.type == "meta" and term.shape == () for term in terms)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in state.model.parameters())


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert precision_dtype(cpu, "auto") == torch.float32
    assert precision_dtype(cpu, "bf16") == torch.bfloat16
    with pytest.raises(UserError, match=r"type pretrain\.precision=bf16"):
        precision_dtype(cpu, "fp16")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_is_chosen_where_a_gpu_does_not_emulate_it(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    cuda = torch.device("cuda")
    assert precision_dtype(cuda, "auto") == expected
    assert precision_dtype(cuda, "fp32") == torch.float32
    assert precision_dtype(cuda, "bf16") == torch.bfloat16, "a wish is a wish"


def test_float16_scales_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scaler a step is the step without one, and a gradient that overflows skips it."""
    config, data = compose(*TINY, "optimizer=sgd", "projector.batch_norm=false"), noise(16)
    batch = Batch(data.images, data.labels)
    (plain, augment), (scaled, _) = training(config), training(config)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for state in (plain, scaled):
        one_step(state, augment, batch)
    before = [p.detach().clone() for p in scaled.model.parameters()]
    for weight, expected in zip(before, plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected.detach())
    terms = scaled.loss.terms
    monkeypatch.setattr(scaled.loss, "terms", lambda anchors: LossTerms(*(1e38 * term for term in terms(anchors))))
    one_step(scaled, augment, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.model.parameters(), strict=True))
    assert scaled.scaler.get_scale() == 512


def test_bfloat16_trains_close_to_float32() -> None:
    full = train(compose(*TINY), noise(200))
    half = train(compose(*TINY, "pretrain.precision=bf16"), noise(200))
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.02)
    assert half[0]["loss"] != full[0]["loss"]


@pytest.mark.parametrize(
    ("word", "value", "on_cpu", "on_cuda"),
    [
        ("auto", "auto", False, True), ("true", True, True, True), ("false", False, False, False),
        ("yes", True, True, True), ("off", False, False, False),
    ],
)  # fmt: skip
def test_compile_takes_auto_true_and_false(word: str, value: object, on_cpu: bool, on_cuda: bool) -> None:
    found = compose(*TINY, f"pretrain.compile={word}").pretrain.compile
    assert found is value or found == value == "auto"
    assert compiles(torch.device("cpu"), found) is on_cpu
    assert compiles(torch.device("cuda"), found) is on_cuda


def test_graphs_of_kernels_are_for_whole_batches_on_a_gpu() -> None:
    words = [*TINY, "pretrain.compile=graphs"]
    assert compiles(torch.device("cuda"), compose(*words).pretrain.compile)
    with pytest.raises(UserError, match=r"needs CUDA: type pretrain\.compile=true or auto"):
        check(compose(*words, "device=cpu"))
    check(compose(*words), here=False)
    for change in ("pretrain.micro_batch=4", "nproc=2"):
        with pytest.raises(UserError, match=r"one process and whole batches: type pretrain\.compile=auto"):
            check(compose(*words, change), here=False)


@pytest.mark.parametrize("word", ["maybe", "1", "null", "0.5", "[]"])
def test_compile_takes_nothing_else(word: str) -> None:
    with pytest.raises(UserError, match=r"^pretrain\.compile=[^\n]+: choose one of auto, true, false[^\n]*$"):
        compose(*TINY, f"pretrain.compile={word}")


@pytest.mark.parametrize("micro_batch", [None, 24])
def test_compiled_steps_have_no_break_and_few_compilations(micro_batch: int | None) -> None:
    """Also with an evaluation between the steps, and with a last part that is smaller than the others."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    config = compose(*TINY, "augment=simclr", "augment.exact=true", "optimizer=sgd")
    (plain, augment), (state, _), data = training(config, 3), training(config, 3), noise(64, 3)
    network, compiled = torch.compile(state.model, backend="eager"), augment.compiled(backend="eager")
    batch, options = Batch(data.images, data.labels), {"dtype": torch.float32, "memory_format": torch.channels_last}
    for _ in range(3):
        found, _ = train_step(state, network, compiled, batch, seed=0, micro_batch=micro_batch, **options)  # type: ignore[arg-type]
        expected, _ = train_step(plain, plain.model, augment, batch, seed=0, micro_batch=micro_batch, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=0)
        state.step, plain.step = state.step + 1, plain.step + 1
        state.model.eval()(data.images[:5].float())
        state.model.train()
    assert not counters["graph_break"]
    parts = 0 if micro_batch is None else 1
    # The augmentation is compiled again for another size; the model also for a pass with a graph.
    assert counters["stats"]["unique_graphs"] <= 2 + 3 * parts


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own dependencies
def test_gradients_are_averaged_over_processes_once_a_step(compiled: bool, tmp_path: Path) -> None:
    """With gradient caching, only the last part's backward pass sends gradients, compiled or not."""
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        replica, sent = DistributedDataParallel(torch.nn.Linear(3, 2)), []

        def note(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            sent.append(bucket.index())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        replica.register_comm_hook(None, note)
        network = torch.compile(replica, backend="eager") if compiled else replica
        for _ in range(2):
            with without_synchronization(network):
                network(torch.ones(4, 3)).sum().backward()
            assert sent == []
        network(torch.ones(4, 3)).sum().backward()
        assert sent == [0]
    finally:
        dist.destroy_process_group()
    with without_synchronization(torch.nn.Linear(3, 2)):
        pass  # one process: there is nothing to hold back


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own dependencies
def test_compiled_encoder_trains_alike() -> None:
    plain = train(compose(*TINY), noise(200))
    compiled = train(compose(*TINY, "pretrain.compile=true"), noise(200))
    assert compiled[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-3)

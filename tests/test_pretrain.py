"""The loop: order, precision, devices and the step that is not finite."""

from typing import Any

import hydra
import pytest
import torch
from conftest import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from scclr.components import make_loss, make_model
from scclr.config import TrainConfig, UserError, build, conf_dir, resolve
from scclr.datasets import ImageSet
from scclr.distributed import World
from scclr.loader import Batch, epoch_order
from scclr.losses import Loss, LossTerms
from scclr.preemption import Pace, Stop
from scclr.pretrain import _Window, precision_of, pretrain, train_step

LOSSES = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))
NEVER = Pace(steps=None, seconds=None, total=-1, stop=Stop())
OFF = torch.amp.GradScaler("cpu", enabled=False)


def compose(*overrides: str) -> TrainConfig:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return resolve(hydra.compose("train", overrides=list(overrides)))


def parts(config: TrainConfig, channels: int = 1) -> tuple[Any, ...]:
    torch.manual_seed(config.seed)
    model = make_model(config, [0.5] * channels, [0.25] * channels, image_size=32)
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=config.pretrain.batch_size)
    return model, make_loss(config, classes=10), build("augment", config.augment), optimizer


def digits(n: int, channels: int = 1) -> ImageSet:
    images = torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.zeros(n, dtype=torch.int64))


def train(config: TrainConfig, data: ImageSet) -> list[dict[str, float]]:
    model, loss, augment, optimizer = parts(config)
    rows: list[dict[str, float]] = []
    pretrain(
        model, loss, augment, optimizer, OFF, data, config.pretrain, seed=config.seed, start=0,
        world=World(), alpha=None, pace=NEVER, log=lambda step, row: rows.append({"step": step, **row}),
        save=lambda step, window: None, knn=lambda: 0.5,
    )  # fmt: skip
    return rows


def test_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    order = epoch_order(0, 3, 100)
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, epoch_order(0, 4, 100))
    assert not torch.equal(order, epoch_order(1, 3, 100))
    assert torch.equal(order, epoch_order(0, 3, 100))


def test_rows_and_learning_rate() -> None:
    rows = train(compose(*TINY, "pretrain.batch_size=32"), digits(100))  # 3 steps an epoch
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert ["knn" in row for row in rows] == [False, True, False, True]
    assert rows[1]["epoch"] == 1
    assert rows[1]["lr"] == pytest.approx(0.002 * 3 / 4)


def test_a_step_that_is_not_finite_is_named() -> None:
    config = compose(*TINY, "pretrain.log_every=5", "pretrain.knn_every=0")
    model, loss, augment, optimizer = parts(config)

    class Spoiled(Loss):
        calls = 0

        def terms(self, anchors):  # type: ignore[no-untyped-def]
            self.calls += 1
            terms = loss.terms(anchors)
            return LossTerms(terms.total * (float("inf") if self.calls == 4 else 1), terms.attract, terms.repel)

    rows: list[int] = []
    with pytest.raises(UserError, match="not finite at step 3"):
        pretrain(
            model, Spoiled(), augment, optimizer, OFF, digits(200), config.pretrain, seed=0, start=0,
            world=World(), alpha=None, pace=NEVER, log=lambda step, row: rows.append(step),
            save=lambda step, window: None, knn=lambda: 0.0,
        )  # fmt: skip
    assert rows == []


@pytest.mark.parametrize("cut_at", [0, 2])  # 0: a checkpoint right after a row
def test_a_window_cut_by_a_checkpoint_gives_the_same_row(cut_at: int) -> None:
    terms, cpu = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), torch.device("cpu")

    def window(part: torch.Tensor, begin: int, carried: dict[str, Any] | None = None) -> _Window:
        window = _Window(cpu, begin, World(), carried)
        for row in part:
            window.add(LossTerms(*row))
        return window

    saved = window(terms[:cut_at], begin=7).state()
    row = window(terms[cut_at:], begin=7 + cut_at, carried=saved).close(12, batch=4)
    for value, name in zip(terms.double().mean(0).tolist(), ("loss", "attract", "repel"), strict=True):
        assert row[name] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("channels", "micro_batch", "cut"), [(1, None, False), (3, None, False), (3, 6, True)])
@pytest.mark.parametrize(
    ("optimizer", "loss"), [("sgd", "balanced"), ("lars", "balanced"), *(("adamw", loss) for loss in LOSSES)]
)
def test_a_whole_step_stays_on_its_device(
    optimizer: str, loss: str, channels: int, micro_batch: int | None, cut: bool
) -> None:
    """On the meta device an operation that mixes devices fails, and so does one that waits for a value."""
    config = compose(
        *TINY, f"optimizer={optimizer}", f"loss={loss}", "augment=simclr", "augment.blur=0.5",
        f"augment.rotation={0 if cut else 10}", "augment.solarize=0.5", "augment.views=[{},{},{jitter: 0}]",
    )  # fmt: skip
    with torch.device("meta"):
        model, criterion, augment, solver = parts(config, channels)
        images = torch.empty(16, *([3] if cut else []), channels, 8, 8, dtype=torch.uint8)  # 3 views
        batch = Batch(images, torch.empty(16, dtype=torch.int64))
    terms, z = train_step(
        model, criterion, augment, solver, OFF, batch, seed=0, step=0, dtype=torch.float32, world=World(),
        layout=torch.channels_last, micro_batch=micro_batch,
    )  # fmt: skip
    assert z.device.type == "meta"
    assert all(term.device.type == "meta" and term.shape == () for term in terms)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


def test_forward_and_loss_on_a_fake_gpu() -> None:
    config = compose(*TINY)
    with FakeTensorMode(), torch.device("cuda"):
        model, loss, _, _ = parts(config)
        _, z = model(torch.rand(8, 1, 8, 8))
        terms = loss(*z.chunk(2))
        assert all(term.device.type == "cuda" and term.dtype == torch.float32 for term in terms)


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert precision_of(cpu, "auto") == torch.float32
    assert precision_of(cpu, "bf16") == torch.bfloat16
    with pytest.raises(UserError, match=r"type pretrain\.precision=bf16"):
        precision_of(cpu, "fp16")


def test_bfloat16_trains_close_to_float32() -> None:
    full = train(compose(*TINY), digits(200))
    half = train(compose(*TINY, "pretrain.precision=bf16"), digits(200))
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.02)
    assert half[0]["loss"] != full[0]["loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own dependencies
def test_compiled_encoder_trains_alike() -> None:
    plain = train(compose(*TINY), digits(200))
    compiled = train(compose(*TINY, "pretrain.compile=true"), digits(200))
    assert compiled[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-3)

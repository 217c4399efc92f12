"""Two processes are one process: loss, terms and every parameter's gradient, for every loss and balance."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY, compose, result_of, rows_of, run_folders
from torch import nn

from scclr.augment import Augment
from scclr.components import make_loss
from scclr.config.compose import conf_dir
from scclr.config.errors import UserError
from scclr.datasets.loader import Batch
from scclr.encoders.convnet import ConvNet
from scclr.losses import Loss
from scclr.pretrain.loop import train_step
from scclr.pretrain.state import TrainState
from scclr.run import distributed
from scclr.run.checkpoint import GENERATIONS, load

ALPHAS = [0.0, 0.3, 0.5, 0.8, 1.0]
IMAGES, CLASSES = 8, 3
LOSSES = sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml"))
CROP = {"crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5, "blur_sigma": [0.1, 2.0]}
OFF = ("rotation", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
AUGMENT = Augment(**CROP, **dict.fromkeys(OFF, 0.0), views=[{}, {}], size=None, exact=False)  # type: ignore[arg-type]


class Network(nn.Module):
    """Layers in a chosen precision."""

    def __init__(self, dtype: torch.dtype, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.dtype = nn.Sequential(*layers).to(dtype), dtype

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.layers(images.to(self.dtype))
        return z, nn.functional.normalize(z, dim=1)


def make(name: str, alpha: float) -> Loss:
    config = compose(f"loss={name}")
    if config.alpha is not None:
        config.loss["alpha"] = config.alpha = alpha
    return make_loss(config, CLASSES)


def make_state(model: nn.Module, loss: Loss, **sgd: float) -> TrainState:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, loss, torch.optim.SGD(model.parameters(), **sgd), scaler)  # type: ignore[arg-type]


def advance(state: TrainState, network: nn.Module, repeats: int = 1, micro_batch: int | None = None) -> Any:
    """One step; (terms as means over processes, embeddings of all)."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (repeats * IMAGES, 1, 6, 6), dtype=torch.uint8, generator=draw)
    batch = Batch(distributed.shard(images), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0]).repeat(repeats))
    terms, z = train_step(
        state, network, AUGMENT, batch,
        seed=0, dtype=torch.float32, memory_format=torch.contiguous_format, micro_batch=micro_batch,
    )  # fmt: skip
    state.step += 1
    return distributed.all_reduce_sum(torch.stack(terms)) / distributed.world_size(), z


def two_steps(name: str, alpha: float, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    """Terms, embeddings and gradients of two steps of a model without batch norm."""
    torch.manual_seed(0)
    model = Network(torch.float64, nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 6))
    state = make_state(model, make(name, alpha), lr=0.1)
    network, found = distributed.replicate(state.model), {}
    for number in range(2):
        found[f"{number} terms"], found[f"{number} z"] = advance(state, network, micro_batch=micro_batch)
        named = state.model.named_parameters()
        found |= {f"{number} {k}": p.grad.clone() for k, p in named if p.grad is not None}
    return found


def thirty_steps(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The loss of every step, and weights and buffers after the last.

    GELU stands for ReLU, whose kink makes two trajectories of a difference in rounding.
    """
    torch.manual_seed(0)
    encoder = ConvNet(in_channels=1, widths=[8, 16], stem_stride=1)
    projector = [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)]
    model = Network(dtype, encoder, *projector)
    state = make_state(model, make("balanced", 0.5), lr=0.02, momentum=0.9)  # above 0.05 rounding errors grow
    with mock.patch.object(nn.functional, "relu", lambda x, inplace=False: nn.functional.gelu(x)):
        network = distributed.replicate(state.model)
        losses = [advance(state, network, repeats=8)[0] for _ in range(30)]
    return {"losses": torch.stack(losses)} | {name: x.detach() for name, x in state.model.state_dict().items()}


def process(rank: int, size: int, folder: str, long: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[Any, Any] = {}
    if long:
        found = {dtype: thirty_steps(dtype) for dtype in (torch.float32, torch.float64)}
    else:
        found = {(name, alpha): two_steps(name, alpha) for name in LOSSES for alpha in ALPHAS}
        found["micro"] = two_steps("balanced", 0.3, micro_batch=3)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(process, (2, str(folder), False), 2)  # type: ignore[no-untyped-call]
    found: dict[Any, Any] = torch.load(folder / "found.pt")
    return found


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_are_one(name: str, alpha: float, two: dict[Any, Any]) -> None:
    close(two[name, alpha], two_steps(name, alpha), 1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
@pytest.mark.parametrize("name", ["balanced", "prototype", "sigmoid", "supcon"])
def test_parts_of_a_batch_are_the_whole(name: str, micro_batch: int) -> None:
    close(two_steps(name, 0.3, micro_batch), two_steps(name, 0.3), 1e-12)


def test_parts_in_two_processes_are_the_whole(two: dict[Any, Any]) -> None:
    close(two["micro"], two_steps("balanced", 0.3), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_batch_norm_of_several_processes_is_that_of_one(size: int, folder: Path) -> None:
    mp.spawn(process, (size, str(folder), True), size)  # type: ignore[no-untyped-call]
    found = torch.load(folder / "found.pt")
    for dtype, of_losses, of_weights in ((torch.float32, 1e-4, 1e-3), (torch.float64, 1e-9, 1e-9)):
        one = thirty_steps(dtype)
        assert one["losses"][0, 0] > 1.1 * one["losses"][-1, 0], "it learns"
        losses = found[dtype].pop("losses")
        torch.testing.assert_close(losses, one["losses"], rtol=of_losses, atol=0)
        for name, value in found[dtype].items():
            error = (value - one[name]).double().norm() / one[name].double().norm()
            assert error < of_weights, f"{dtype} {name}: {error:.1e}"


@pytest.mark.slow
def test_two_processes_train_one_model(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    plain = [sys.executable, "-m"]
    line = ["scclr", "train", *TINY, "checkpoint.every=5"]
    commands = {"one": [*plain, *line], "torchrun": [*torchrun, *line], "nproc": [*plain, *line, "nproc=2"]}
    for runs, command in commands.items():
        done = subprocess.run([*command, f"runs={runs}"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert done.stdout.count("test accuracy") == 1
    one, *others = (next((folder / runs / "default").glob("*/")) for runs in commands)
    expected, weights = rows_of(one), load(one)
    for other in others:
        assert other.name == one.name
        for row, wanted in zip(rows_of(other), expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
        assert [load(other / name)["step"] for name in GENERATIONS] == [6, 5]
        for name, value in load(other)["model"].items():
            torch.testing.assert_close(value, weights["model"][name], rtol=1e-3, atol=1e-4)
        assert result_of(other)["metrics"] == pytest.approx(result_of(one)["metrics"], abs=0.01)
    refused = subprocess.run([*torchrun, *line, "-m", "seed=0,1"], env=environment, capture_output=True, text=True)
    assert "a sweep cannot run inside torchrun" in refused.stderr
    wrong = [*plain, *line, "nproc=2", "dataset.imbalance=10000", "runs=wrong"]
    refused = subprocess.run(wrong, env=environment, capture_output=True, text=True)
    line_of_error = r"scclr train: error: rank [01]: dataset\.imbalance=10000 leaves no image.*\n"
    assert re.fullmatch(line_of_error, refused.stderr), refused.stderr
    assert run_folders(folder) == []


@pytest.mark.parametrize("size", ["2", "", "two"])
def test_half_an_environment_of_torchrun_is_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=r"WORLD_SIZE=.*start with torchrun, or unset WORLD_SIZE"):
        distributed.launched_processes()

"""Two processes are one process: loss, terms and every parameter's gradient, for every loss and balance."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY, result_of, rows_of, run_folders
from torch import nn

from scclr import theory
from scclr.augment import Augment
from scclr.checkpoint import GENERATIONS, load
from scclr.config import build
from scclr.distributed import World
from scclr.encoders.convnet import ConvNet
from scclr.loader import Batch
from scclr.losses import Loss
from scclr.pretrain import train_step

ALPHAS = [0.0, 0.3, 0.5, 0.8, 1.0]
IMAGES, CLASSES = 8, 3
HYPER = {
    "align_uniform": {"t": 2.0},
    "balanced": {"temperature": 0.3},
    "debiased": {"temperature": 0.5, "class_prior": 0.1},
    "decoupled": {"temperature": 0.3},
    "hard_negative": {"temperature": 0.5, "class_prior": 0.1, "hardness": 0.5},
    "infonce": {"temperature": 0.3},
    "nscl": {"temperature": 0.3},
    "ntxent": {"temperature": 0.3},
    "prototype": {"temperature": 0.3, "repulsion": "logsumexp", "momentum": 0.9},
    "sigmoid": {"scale": 5.0, "bias": -2.0},
    "spectral": {"mu": 2.0},
    "supcon": {"temperature": 0.3},
}
VIEWS = {"views": [{}, {}], "size": None, "exact": False}
CROP = {"crop_scale": [0.5, 1.0], "crop_ratio": [0.75, 1.33], "flip": 0.5, "blur_sigma": [0.1, 2.0]}
OFF = ("rotation", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")


class Network(nn.Module):
    """A float64 model without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.layers(images.double())
        return z, nn.functional.normalize(z, dim=1)


def make(name: str, alpha: float) -> Loss:
    stem = {"ntxent": "NTXent", "infonce": "InfoNCE", "nscl": "NSCL", "supcon": "SupCon"}.get(name)
    target = f"scclr.losses.{name}.{stem or name.title().replace('_', '')}Loss"
    balance = {} if name == "ntxent" else {"alpha": alpha}
    loss: Loss = build("loss", {"_target_": target, **HYPER[name], **balance}, classes=CLASSES)
    return loss


def batch(world: World, times: int = 1) -> Batch:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (times * IMAGES, 1, 6, 6), dtype=torch.uint8, generator=draw)
    return Batch(world.share(images), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0]).repeat(times))


def step(name: str, alpha: float, world: World, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    """Terms summed over processes, and the gradients, of two steps (the second sees what ``update`` remembers)."""
    model, loss = Network(), make(name, alpha)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward, found = world.replicate(model), {}
    for number in range(2):
        augment = Augment(**VIEWS, **CROP, **dict.fromkeys(OFF, 0.0))  # type: ignore[arg-type]
        terms, z = train_step(
            forward, loss, augment, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch(world),
            seed=0, step=number, dtype=torch.float32, layout=torch.contiguous_format, world=world,
            micro_batch=micro_batch,
        )  # fmt: skip
        found[f"{number} terms"] = world.sum(torch.stack(terms)) / world.size
        found[f"{number} z"] = z
        found |= {f"{number} {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return found


def measure(world: World, cut: int = 0) -> dict[str, torch.Tensor]:
    """Every number of the theory, of ``cut`` images in one process and the rest in another."""
    draw = torch.Generator().manual_seed(2)
    z = nn.functional.normalize(torch.randn(20, 3, 5, dtype=torch.float64, generator=draw), dim=2)
    labels = torch.tensor([0, 1, 2, 0, 1, 1, 2, 0, 1, 2, 0, 1, 2, 0, 2, 1, 3, 3, 3, 4])
    if world.size > 1:
        part = slice(0, cut) if world.leads else slice(cut, None)
        z, labels = z[part], labels[part]
    results = [
        theory.prototype_bias(z, labels, world=world),
        theory.supervised_objective(z, labels, 0.5, world=world),
        *theory.bound(z, labels, [0.2, 1.0], 0.5, world=world),
        theory.nscl_gap(z, labels, 0.3, world=world),
    ]
    numbers = [list(asdict(result).values()) for result in results]
    found = {"numbers": torch.tensor(list(flat(numbers)), dtype=torch.float64)}
    collapse = asdict(theory.collapse(z, labels, world=world))
    return found | {"collapse": torch.tensor(list(flat(list(collapse.values()))), dtype=torch.float64)}


def flat(x: Any) -> Iterator[float]:
    for part in x.values() if isinstance(x, dict) else x:
        yield from flat(part) if isinstance(part, (dict, list, tuple)) else [float(part)]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2)
    found: dict[Any, Any] = {(name, alpha): step(name, alpha, world) for name in HYPER for alpha in ALPHAS}
    found["micro"] = step("balanced", 0.3, world, micro_batch=3)
    found |= {("theory", cut): measure(world, cut) for cut in (0, 7)}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(process, (str(folder),), 2)  # type: ignore[no-untyped-call]
    found: dict[Any, Any] = torch.load(folder / "found.pt")
    return found


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_every_loss_is_covered() -> None:
    from scclr.config import conf_dir

    assert set(HYPER) == {path.stem for path in (conf_dir() / "loss").glob("*.yaml")}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", HYPER)
def test_two_processes_are_one(name: str, alpha: float, two: dict[Any, Any]) -> None:
    close(two[name, alpha], step(name, alpha, World()), 1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
@pytest.mark.parametrize("name", ["balanced", "prototype", "sigmoid", "supcon"])
def test_parts_of_a_batch_are_the_whole(name: str, micro_batch: int) -> None:
    close(step(name, 0.3, World(), micro_batch), step(name, 0.3, World()), 1e-12)


def test_parts_in_two_processes_are_the_whole(two: dict[Any, Any]) -> None:
    close(two["micro"], step("balanced", 0.3, World()), 1e-12)


def test_the_theory_of_parts_is_that_of_the_whole(two: dict[Any, Any]) -> None:
    whole = measure(World())
    for cut in (0, 7):
        for name in whole:
            found = two["theory", cut][name]
            torch.testing.assert_close(found, whole[name], rtol=1e-9, atol=1e-9, equal_nan=True)


class Convolutional(nn.Module):
    """An encoder and a projector with batch norm in a chosen precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        encoder = ConvNet(in_channels=1, widths=[8, 16], stem_stride=1)
        projector = [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)]
        self.layers = nn.Sequential(encoder, *projector).to(dtype)
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.layers(images.to(self.dtype))
        return z, nn.functional.normalize(z, dim=1)


def thirty_steps(dtype: torch.dtype, world: World) -> dict[str, torch.Tensor]:
    """The loss of every step, and weights and buffers after the last.

    GELU stands for ReLU, whose kink makes two trajectories of a difference in rounding.
    """
    with mock.patch.object(nn.functional, "relu", lambda x, inplace=False: nn.functional.gelu(x)):
        return thirty_smooth_steps(dtype, world)


def thirty_smooth_steps(dtype: torch.dtype, world: World) -> dict[str, torch.Tensor]:
    model, loss, losses = Convolutional(dtype), make("balanced", 0.5), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  # above 0.05 rounding grows step by step
    forward = world.replicate(model)
    for number in range(30):
        augment = Augment(**VIEWS, **CROP, **dict.fromkeys(OFF, 0.0))  # type: ignore[arg-type]
        terms, _ = train_step(
            forward, loss, augment, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch(world, 8),
            seed=0, step=number, dtype=torch.float32, layout=torch.contiguous_format, world=world,
        )  # fmt: skip
        losses.append(world.sum(torch.stack(terms)) / world.size)
    return {"losses": torch.stack(losses)} | {name: x.detach() for name, x in model.state_dict().items()}


def thirty_steps_of(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found = {dtype: thirty_steps(dtype, World(rank, size)) for dtype in (torch.float32, torch.float64)}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_batch_norm_of_several_processes_is_that_of_one(size: int, folder: Path) -> None:
    mp.spawn(thirty_steps_of, (size, str(folder)), size)  # type: ignore[no-untyped-call]
    found = torch.load(folder / "found.pt")
    for dtype, of_losses, of_weights in ((torch.float32, 1e-4, 1e-3), (torch.float64, 1e-9, 1e-9)):
        one = thirty_steps(dtype, World())
        assert one["losses"][0, 0] > 1.2 * one["losses"][-1, 0], "it learns"
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
    for command, runs in (
        ([*torchrun, *line], "torchrun"),
        ([*plain, *line, "nproc=2"], "nproc"),
        (plain + line, "one"),
    ):
        done = subprocess.run([*command, f"runs={runs}"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    kinds = ("one", "torchrun", "nproc")
    one, *others = (next((folder / runs / "default").glob("*/")) for runs in kinds)
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
    assert run_folders(folder) == []

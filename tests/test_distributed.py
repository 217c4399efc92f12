"""Two processes are one process: loss, terms and every parameter's gradient, for every loss and balance."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import partial
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
from scclr.pretrain.loop import train_step, without_synchronization
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


class GpuKernels:
    """What the kernels of ``torch.nn.SyncBatchNorm`` compute, for a CPU, and the types that they take."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        for name in ("stats", "gather_stats_with_counts", "elemt", "backward_reduce", "backward_elemt"):
            self.library.impl(f"batch_norm_{name}", getattr(self, name), "CPU")

    @staticmethod
    def along(x: torch.Tensor, *of_channels: torch.Tensor) -> list[torch.Tensor]:
        assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        width = torch.promote_types(x.dtype, torch.float32)
        assert all(value.dtype == width for value in of_channels), "float32 beside narrower images"
        return [x.to(width), *(value.view(-1, *[1] * (x.ndim - 2)) for value in of_channels)]

    def stats(self, x: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        (wide,) = self.along(x)
        variance, mean = torch.var_mean(wide.transpose(0, 1).flatten(1), 1, correction=0)
        return mean, (variance + eps).rsqrt()

    def gather_stats_with_counts(self, x, means, inverses, moved_mean, moved_var, momentum, eps, counts):  # type: ignore[no-untyped-def]
        assert counts.dtype == means.dtype
        assert counts.shape == means.shape[:1]
        share = (counts / counts.sum()).unsqueeze(1)
        mean = (share * means).sum(0)
        variance = (share * (inverses**-2 - eps + (means - mean) ** 2)).sum(0)
        moved_mean.lerp_(mean, momentum)
        moved_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def elemt(self, x, weight, bias, mean, inverse, eps):  # type: ignore[no-untyped-def]
        wide, weight, bias, mean, inverse = self.along(x, weight, bias, mean, inverse)
        return torch.empty_like(x).copy_((wide - mean) * inverse * weight + bias)

    def backward_reduce(self, dy, x, mean, inverse, weight, *wanted):  # type: ignore[no-untyped-def]
        (slope,), (wide, centre, _) = self.along(dy), self.along(x, mean, weight)
        sums = [part.transpose(0, 1).flatten(1).sum(1) for part in (slope, slope * (wide - centre))]
        return *sums, sums[1] * inverse, sums[0]

    def backward_elemt(self, dy, x, mean, inverse, weight, sum_dy, sum_dy_xmu, counts):  # type: ignore[no-untyped-def]
        assert counts.dtype == torch.int32
        sums = (sum_dy / counts.sum(), sum_dy_xmu / counts.sum())
        wide, mean, inverse, weight, mean_dy, mean_dy_xmu = self.along(x, mean, inverse, weight, *sums)
        dx = (self.along(dy)[0] - mean_dy - (wide - mean) * inverse**2 * mean_dy_xmu) * inverse * weight
        return torch.empty_like(x).copy_(dx)


NORMS = {
    "channels_last": (nn.BatchNorm2d(5), (8, 5, 3, 3), torch.channels_last),
    "contiguous": (nn.BatchNorm2d(5), (8, 5, 3, 3), torch.contiguous_format),
    "vectors": (nn.BatchNorm1d(5), (8, 5), torch.contiguous_format),
    "plain": (nn.BatchNorm1d(5, affine=False), (8, 5), torch.contiguous_format),
    "cumulative": (nn.BatchNorm1d(5, momentum=None), (8, 5), torch.contiguous_format),
    "untracked": (nn.BatchNorm1d(5, track_running_stats=False), (8, 5), torch.contiguous_format),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normalized(case: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two steps of batch normalization of all images, of which each process has its part, in float64.

    A single process computes in float64. Several compute in ``dtype``, with weights of at least float32.
    """
    norm, shape, order = NORMS[case]
    parts = dist.is_initialized()
    norm = deepcopy(norm).to(torch.promote_types(dtype, torch.float32) if parts else torch.float64)
    draw = torch.Generator().manual_seed(3)
    if norm.affine:
        nn.init.normal_(norm.weight, generator=draw)
    if parts:
        norm.forward = partial(distributed._synchronized, norm)  # type: ignore[method-assign]
    found = {}
    for step in range(2):
        x, dy = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
        x = distributed.shard(x).to(dtype if parts else torch.float64).contiguous(memory_format=order).requires_grad_()
        y = norm(x)
        assert y.dtype == x.dtype
        y.backward(distributed.shard(dy).to(x.dtype))
        assert x.grad is not None
        for name, value in {"y": y.detach(), "dx": x.grad}.items():
            assert value.is_contiguous(memory_format=order), name
            found[f"{name} {step}"] = distributed.gather(value.contiguous())
    found |= {name: distributed.all_reduce_sum(p.grad.clone()) for name, p in norm.named_parameters()}  # type: ignore[union-attr]
    x = torch.randn(shape, generator=draw).to(dtype if parts else torch.float64)
    found |= {**dict(norm.named_buffers()), "evaluated": norm.eval()(x).detach()}
    return {name: value.double() for name, value in found.items()}


def beginnings_and_ends() -> dict[str, torch.Tensor]:
    """Buffers of all processes, which begin with different weights and see different images: [W, number of values]."""
    torch.manual_seed(distributed.rank())
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    model[1].running_var.fill_(distributed.rank())  # type: ignore[operator, union-attr]
    network, found = distributed.replicate(model), {}
    for moment in ("begin", "end"):
        values = torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])
        found[moment] = distributed.gather(values.unsqueeze(0))
        for _ in range(3 if moment == "begin" else 0):
            network(torch.randn(4, 1, 6, 6)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
                    p.grad = None
    return found


def gradients_of_parts(compiled: bool) -> dict[str, torch.Tensor]:
    """A weight's gradient in all processes [W, 3], after a backward pass that stays in each, and after one that not."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    network = distributed.replicate(model)
    network = torch.compile(network, backend="eager") if compiled else network  # type: ignore[assignment]
    x, found = torch.ones(1, 3) * (1 + distributed.rank()), {}
    with without_synchronization(network):
        network(x).sum().backward()
        assert model.weight.grad is not None
        found["own"] = distributed.gather(model.weight.grad.clone())
    network(x).sum().backward()
    found["all"] = distributed.gather(model.weight.grad.clone())
    return found


def process(rank: int, size: int, folder: str, long: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[Any, Any] = {}
    if long:
        found = {dtype: thirty_steps(dtype) for dtype in (torch.float32, torch.float64)}
    else:
        found = {(name, alpha): two_steps(name, alpha) for name in LOSSES for alpha in ALPHAS}
        found["micro"] = two_steps("balanced", 0.3, micro_batch=3)
        found |= {("CPU", case, dtype): normalized(case, dtype) for case in NORMS for dtype in DTYPES}
        kernels = GpuKernels()
        with mock.patch.object(distributed, "_BatchNormOfAll", distributed._BatchNormOnCuda):
            found |= {("CUDA", case, dtype): normalized(case, dtype) for case in NORMS for dtype in DTYPES}
        del kernels
        found["buffers"] = beginnings_and_ends()
        found |= {f"parts {compiled}": gradients_of_parts(compiled) for compiled in (False, True)}
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("kernels", ["CPU", "CUDA"])
def test_batch_norm_takes_narrow_images_beside_weights_in_float32(
    kernels: str, case: str, dtype: torch.dtype, two: dict[Any, Any]
) -> None:
    found, expected = two[kernels, case, dtype], normalized(case, dtype)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = name.startswith(("y", "dx", "evaluated"))  # these are in dtype, the others in float32 at least
        tolerance = 4 * torch.finfo(dtype if rounded else torch.promote_types(dtype, torch.float32)).eps
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max() <= 4 * tolerance * scale, name


def test_processes_begin_with_equal_buffers_and_keep_them_equal(two: dict[Any, Any]) -> None:
    begin, end = (two["buffers"][moment] for moment in ("begin", "end"))
    assert torch.equal(begin[0], begin[1])
    assert torch.equal(end[0], end[1])
    assert not torch.equal(begin, end)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_parts_stay_in_their_process_also_if_compiled(compiled: bool, two: dict[Any, Any]) -> None:
    found = two[f"parts {compiled}"]
    assert found["own"].tolist() == [[1, 1, 1], [2, 2, 2]]
    assert found["all"].tolist() == [[3, 3, 3], [3, 3, 3]]  # the mean of 1 + 1 and 2 + 2


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
        assert done.stdout.count("test split") == 1
    one, *others = (next((folder / runs / "default").glob("*/")) for runs in commands)
    expected, weights = rows_of(one), load(one)
    for other in others:
        assert other.name == one.name
        for row, wanted in zip(rows_of(other), expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
        assert [load(other / name)["step"] for name in GENERATIONS] == [6, 5]
        for name, value in load(other)["model"].items():
            torch.testing.assert_close(value, weights["model"][name], rtol=1e-3, atol=1e-4)
        assert result_of(other)["metrics"] == pytest.approx(result_of(one)["metrics"], rel=0.01, abs=0.01)
    refused = subprocess.run([*torchrun, *line, "-m", "seed=0,1"], env=environment, capture_output=True, text=True)
    assert "a sweep cannot run inside torchrun" in refused.stderr
    wrong = [*plain, *line, "nproc=2", "dataset.imbalance=10000", "runs=wrong"]
    refused = subprocess.run(wrong, env=environment, capture_output=True, text=True)
    line_of_error = r"scclr train: error: rank [01]: dataset\.imbalance=10000 leaves no image.*\n"
    assert re.fullmatch(line_of_error, refused.stderr), refused.stderr
    assert run_folders(folder) == []


@pytest.fixture
def in_group(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This process is the second of two on a machine with two GPUs. Returns what it does with the group, in order."""
    group = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    done: list[str] = []
    started = {"init_process_group": "init", "destroy_process_group": "destroy"}
    for name, word in started.items():
        monkeypatch.setattr(dist, name, lambda *_, word=word: done.append(word))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(done) and done[-1] not in ("destroy", "abort"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: done.append("meet"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda _: done.append("abort"), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    return done


def test_processes_leave_together_after_a_success(in_group: list[str]) -> None:
    with distributed.process_group(torch.device("cuda")) as device:
        assert device == torch.device("cuda", 1)
        in_group.append("work")
    assert in_group == ["cuda:1", "init", "work", "meet", "destroy"]


@pytest.mark.parametrize("error", [ValueError("a fault"), SystemExit(75), KeyboardInterrupt()], ids=repr)
def test_a_process_that_fails_waits_for_nobody_and_aborts(error: BaseException, in_group: list[str]) -> None:
    with pytest.raises(type(error)), distributed.process_group(torch.device("cuda")):
        raise error
    assert in_group == ["cuda:1", "init", "abort"]


def test_a_pytorch_that_cannot_abort_is_left_alone(in_group: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist.distributed_c10d, "_abort_process_group")
    with pytest.raises(ValueError, match="a fault"), distributed.process_group(torch.device("cuda")):
        raise ValueError("a fault")
    assert in_group == ["cuda:1", "init"]


def test_too_little_memory_is_not_taken_for_a_lost_process(in_group: list[str]) -> None:
    message = "NCCL error: ncclUnhandledCudaError. Last error: Cuda failure 2 'out of memory'"
    with pytest.raises(RuntimeError, match="out of memory"), distributed.process_group(torch.device("cuda")):
        raise RuntimeError(message)


def test_more_processes_than_gpus_are_refused(in_group: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = r"^there are 1 CUDA devices here: type torchrun --nproc-per-node=1$"
    with pytest.raises(UserError, match=message), distributed.process_group(torch.device("cuda")):
        pass
    assert in_group == []


def test_processes_that_srun_started_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the job: a single process in its script has it too
    assert distributed.launched_processes() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # as in a job of submitit
    assert distributed.launched_processes() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=4: .*; type srun --ntasks-per-node=1 torchrun "):
        distributed.launched_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.launched_processes() == 1, "torchrun is there"


@pytest.mark.parametrize("size", ["2", "", "two"])
def test_half_an_environment_of_torchrun_is_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=r"WORLD_SIZE=.*start with torchrun, or unset WORLD_SIZE"):
        distributed.launched_processes()

"""The device that the tests of a GPU run on, and small trainings there.

``SCCLR_TEST_DEVICE=cpu`` runs the same tests on the CPU, with smaller sizes and without what only a GPU has: memory
that is counted, and a queue of kernels. That checks the tests themselves.
"""

import fcntl
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import compose
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor

from scclr.augment import Augment
from scclr.cli import dispatch
from scclr.components import make_augment, make_loss, make_model, make_optimizer
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet
from scclr.pretrain.loop import precision_dtype, pretrain
from scclr.pretrain.state import TrainState
from scclr.run.checkpoint import Checkpoints
from scclr.run.preemption import CheckpointSchedule, Stop
from scclr.run.tracking import Log

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
DEVICE = torch.device(os.environ.get("SCCLR_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
GPUS = torch.cuda.device_count() if CUDA else 2
MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(CUDA and GPUS == 0, reason="no CUDA device here"),
    pytest.mark.filterwarnings("default"),  # what PyTorch remarks about a card is shown, but fails no test
]
WORDS = [  # a run of seconds: small images that need no download, and nothing to compile
    "dataset=digits", "dataset.limit=300", "augment=digits", "encoder=convnet", "encoder.widths=[8,16]",
    "projector.hidden_dim=32", "projector.out_dim=16", "pretrain.batch_size=64", "pretrain.log_every=2",
    "pretrain.knn_every=0", "pretrain.compile=false",
    "probe.protocols.logreg.l2=[0.01,0.1]", "probe.protocols.logreg.max_iter=20",
    f"device={DEVICE.type}",
]  # fmt: skip

T = TypeVar("T")


def sized(cuda: T, cpu: T) -> T:
    """The size of a test on a GPU, or on the CPU."""
    return cuda if CUDA else cpu


@pytest.fixture
def alone() -> None:
    """Asked for by a test that measures time: it has the card for itself, whatever pytest-xdist runs beside it."""


@pytest.fixture(autouse=True)
def card(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products in full float32; memory is given back afterwards, for the tests in other processes."""
    with open(Path(tempfile.gettempdir()) / "scclr-test-cuda.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if "alone" in request.fixturenames else fcntl.LOCK_SH)
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            yield
        torch.set_float32_matmul_precision(older)
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of the GPU's memory that a call takes beyond what is allocated before; 0 on the CPU."""
    if not CUDA:
        function()
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    """``found`` differs from the float64 ``wanted`` by at most ``tolerance`` of the largest number in it."""
    wanted = wanted.to(found.device).double()
    error = (found.detach().double() - wanted).abs().max().item()
    largest = wanted.abs().max().item()
    assert error <= tolerance * max(largest, 1e-30), f"{what}: {error:.2e} beside {largest:.2e}"


def coloured(n: int, side: int = 32, classes: int = 10) -> ImageSet:
    """Smooth random colour images on the device; those of a class share their coarse form."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    coarse = torch.rand(classes, 3, 4, 4, generator=draw)[labels] + 0.5 * torch.rand(n, 3, 4, 4, generator=draw)
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").mul(170).byte()
    return ImageSet(images.to(DEVICE), labels.to(DEVICE))


def parts(*words: str) -> tuple[TrainConfig, TrainState, Augment]:
    """(configuration, state before the first step, augmentation) of a command line on colour images of CIFAR's size."""
    small = ["encoder=convnet", "encoder.widths=[8,16]"]
    network = sized(["encoder=resnet18"], small) if not any(word.startswith("encoder=") for word in words) else []
    config = compose("dataset=cifar10", "augment=simclr", *network, *words)
    torch.manual_seed(0)
    model = make_model(config, [0.5] * 3, [0.25] * 3, image_size=32).to(DEVICE)
    if config.pretrain.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=config.pretrain.precision == "fp16")
    state = TrainState(model, make_loss(config, classes=10), make_optimizer(config, model), scaler)
    return config, state, make_augment(config)


class Rows(Log):
    """A log that keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def row(self, step: int, values: Any) -> None:
        self.rows.append({"step": step, **values})


def trained(steps: int, *words: str) -> list[dict[str, float]]:
    """The rows of a training of one epoch of so many steps."""
    config, state, augment = parts("pretrain.epochs=1", "pretrain.knn_every=0", *words)
    precision_dtype(DEVICE, config.pretrain.precision)  # refuses fp16 on a CPU
    log, never = Rows(), CheckpointSchedule(steps=None, seconds=None, total=-1, stop=Stop())
    pretrain(
        state, coloured(steps * config.pretrain.batch_size), augment, config.pretrain,
        seed=0, alpha=None, checkpoints=Checkpoints(Path(), never, {}), log=log, evaluations=[],
    )  # fmt: skip
    return log.rows


def scclr(folder: Path, *words: str, code: int = 0, launcher: tuple[str, ...] = ()) -> str:
    """``scclr train``, which ends with ``code`` within three minutes; its standard error.

    One process is this one: to start another takes up to half a minute where CUDA is.
    """
    if not launcher and not any(word.startswith("nproc=") for word in words):
        GlobalHydra.instance().clear()
        said = io.StringIO()
        with chdir(folder), redirect_stderr(said):
            found = dispatch(["train", *words])
        assert found == code, said.getvalue()[-3000:]
        return said.getvalue()
    line = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "scclr", "train", *words]
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def environment(**env: str) -> dict[str, str]:
    """That of a process: without W&B, and without the variables that a launcher of this process has set."""
    left_out = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "WANDB_SERVICE", "HYDRA_FULL_ERROR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **env}


def saved(folder: Path) -> bool:
    """Whether the one run below ``folder`` has written a checkpoint."""
    return any(folder.glob("*/*/last.pt"))


def run_of(folder: Path) -> Path:
    """The one run folder below ``folder``."""
    (run,) = (path.parent for path in folder.glob("*/*/config.yaml"))
    return run


@contextmanager
def recompilations() -> Iterator[list[str]]:
    """The reasons for which ``torch.compile`` compiles something a second time."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    keep, logger = Keep(), logging.getLogger("torch._dynamo.guards.__recompiles")
    torch._logging.set_logs(recompiles=True)
    logger.addHandler(keep)
    try:
        yield found
    finally:
        logger.removeHandler(keep)
        torch._logging.set_logs()


def seconds_of(function: Callable[[], object]) -> float:
    """How long a call keeps the host."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

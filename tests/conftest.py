"""Runs of the command line in this process, in a folder of their own, and the parts of a small run."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from scclr import load, train
from scclr.augment import Augment
from scclr.components import make_loss, make_model
from scclr.config.build import build
from scclr.config.compose import parse, plan
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet
from scclr.pretrain.state import TrainState

if TYPE_CHECKING:
    from scclr.api import Run

import_module("scclr.train")  # whose names tests replace; until then the attribute of the package is a function
os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("HYDRA_FULL_ERROR", None)
torch.set_num_threads(1)  # the tests are too small for two
os.environ["OMP_NUM_THREADS"] = "1"  # so are the processes that they start

# A run of a second: 300 digits, two small blocks, 6 steps.
TINY = [
    "dataset.limit=300",
    "encoder.widths=[8,16]",
    "projector.hidden_dim=32",
    "projector.out_dim=16",
    "pretrain.epochs=2",
    "pretrain.batch_size=64",
    "pretrain.warmup=0.5",
    "pretrain.log_every=2",
    "pretrain.knn_every=1",
    "probe.protocols.logreg.l2=[0.01,0.1]",
    "probe.protocols.logreg.max_iter=20",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scclr(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``scclr(*words)`` runs one command line in ``folder`` and returns its exit code."""
    monkeypatch.setattr("sys.argv", ["scclr"])

    def run(*words: str) -> int:
        from scclr.cli import dispatch

        GlobalHydra.instance().clear()
        try:
            return dispatch(list(words))
        finally:
            GlobalHydra.instance().clear()

    return run


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, of the module's ``WORDS``."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        train(*request.module.WORDS)
    return folder


@pytest.fixture
def run(trained: Path, folder: Path) -> "Run":
    """A copy of the run in ``trained``, which a test may change."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    (directory,) = Path("runs").glob("*/*")
    return load(directory)


def compose(*overrides: str) -> TrainConfig:
    """The configuration of a command line."""
    return deepcopy(_composed(*overrides))


@cache
def _composed(*overrides: str) -> TrainConfig:
    (point,) = plan(parse(overrides)).points
    return point.config


def training(config: TrainConfig, channels: int = 1) -> tuple[TrainState, Augment]:
    """The state before the first step, and the augmentation."""
    torch.manual_seed(config.seed)
    model = make_model(config, [0.5] * channels, [0.25] * channels, image_size=32)
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=config.pretrain.batch_size)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, make_loss(config, classes=10), optimizer, scaler), build("augment", config.augment)


def noise(n: int, channels: int = 1) -> ImageSet:
    """``n`` random images of 8 x 8 pixels, all of class 0."""
    images = torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.zeros(n, dtype=torch.int64))


def run_folders(folder: Path) -> list[Path]:
    """The run folders below ``folder``/runs."""
    return sorted(path.parent for path in (folder / "runs").glob("*/*/config.yaml"))


def result_of(run: Path) -> dict:
    """The ``result.json`` of a run folder."""
    return json.loads((run / "result.json").read_text())


def rows_of(run: Path) -> list[dict]:
    """The rows of a run's ``metrics.jsonl`` but for its timings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pretrain/images_per_second"} for row in rows]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests/faults in full: 20 kills, every signal")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the faults are injected in full."""
    return bool(request.config.getoption("--full"))

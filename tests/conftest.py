"""Runs of the command line in this process, in a folder of their own."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("HYDRA_FULL_ERROR", None)
torch.set_num_threads(1)  # the tests are too small for two

# A run of a second: 300 digits, two small blocks, 6 steps.
TINY = [
    "dataset.limit=300",
    "encoder.widths=[8,16]",
    "projector.hidden_dim=32",
    "projector.out_dim=16",
    "pretrain.epochs=2",
    "pretrain.batch_size=64",
    "pretrain.warmup_epochs=1",
    "pretrain.log_every=2",
    "pretrain.knn_every=1",
    "probe.l2=[0.01,0.1]",
    "probe.max_iter=20",
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

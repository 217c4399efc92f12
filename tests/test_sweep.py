"""The points of a sweep, and the folders that tell what became of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

from scclr.checkpoint import HeldError, claimed, save
from scclr.config import UserError
from scclr.sweep import Point, before, clock, fail, listed, remember, status


def test_states_costs_and_outlook(tmp_path: Path) -> None:
    points = [Point(tmp_path / name, f"seed={i}") for i, name in enumerate("abcde")]
    assert (
        before(points, at_once=1) == "5 points: 0 done, 5 missing; no finished run beside them tells how long they take"
    )
    remember(points[:3])
    remember(points[2:])
    for point in points[:4]:
        point.directory.mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps({"seconds": {"total": 100}}))
    fail(tmp_path / "b", "loss: too high")
    save(tmp_path / "c", {"model": {"w": torch.zeros(1)}, "seconds": 20.0})
    with claimed(tmp_path / "d", overwrite=False):
        assert [point.state for point in points] == ["done", "failed", "stopped", "running", "missing"]
        lines = status(tmp_path)
    assert lines[0] == f"{tmp_path}: 5 points: 1 done, 1 running, 1 failed, 1 stopped, 1 missing"
    assert lines[1] == "2 min so far; about 100 s each and 7 min for all, as in 1 finished runs"
    assert lines[2] == f"  failed   seed=1 ({tmp_path / 'b'}): loss: too high"
    assert [line.split()[0] for line in lines[2:]] == ["failed", "stopped", "running", "missing"]
    assert "200 s" not in before(points, at_once=4)
    assert before(points, at_once=4).endswith("about 100 s each and 100 s for all, as in 1 finished runs")
    with pytest.raises(UserError, match="no runs"):
        status(tmp_path / "e")
    assert (clock(119), clock(121), clock(7300)) == ("119 s", "2 min", "2.0 h")
    with claimed(tmp_path / "b", overwrite=False):
        assert listed(points[1:2])[0].startswith("  running")
    assert points[1].state == "missing", "the next attempt takes the error away"


def test_a_held_folder_names_its_holder(tmp_path: Path) -> None:
    import os

    with claimed(tmp_path, overwrite=False), pytest.raises(HeldError, match=f"pid {os.getpid()} on "):
        claimed(tmp_path, overwrite=False).__enter__()


def test_failed_points_are_listed_and_the_finished_ones_not_run_again(
    scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import scclr.stages as stages

    pretrain = stages.pretrain

    def faulty(*args, **named):  # type: ignore[no-untyped-def]
        if named["seed"] == 1:
            raise ZeroDivisionError("by seed 1")
        return pretrain(*args, **named)

    monkeypatch.setattr(stages, "pretrain", faulty)
    line = ["train", "-m", "seed=0,1", "stages=[pretrain]", *TINY]
    assert scclr(*line) == 1
    shown = capsys.readouterr()
    assert "seed=1" in shown.err
    assert "ZeroDivisionError: by seed 1" in shown.err
    assert shown.out.splitlines()[-2] == "2 points: 1 done, 1 failed"
    assert shown.out.splitlines()[-1].endswith("ZeroDivisionError: by seed 1")
    (finished,) = {path.parent for path in folder.glob("runs/*/*/result.json")}
    stamp = (finished / "result.json").stat().st_mtime_ns
    monkeypatch.setattr(stages, "pretrain", pretrain)
    assert scclr(*line) == 0
    assert "about" in capsys.readouterr().err.splitlines()[0]
    assert scclr("sweep-status", "runs/default") == 0
    assert "2 points: 2 done" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == stamp
    assert scclr("sweep-status") == 1

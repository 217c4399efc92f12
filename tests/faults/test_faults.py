"""Runs and sweeps that are killed, stopped, or lose their disk, their output or a process, and are then typed again.

CI runs a short form; ``pytest tests/faults --full -n 0`` is the full one (20 kills, fifteen minutes on two cores).
"""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import checkpoint_files
import numpy as np
import processes
import pytest
import torch
from conftest import TINY, result_of, rows_of
from PIL import Image
from processes import children, finish, in_full_form, until

from scclr.config.errors import UserError
from scclr.run.checkpoint import load, resume, save
from scclr.run.files import GENERATIONS
from scclr.run.lock import run_lock
from scclr.run.preemption import STOPPED

pytestmark = pytest.mark.slow
LINE = [*TINY, "pretrain.epochs=14", "pretrain.log_every=5", "pretrain.knn_every=5", "checkpoint.every=2", "runs=runs"]
STEPS = ("scclr.pretrain.loop", "train_step")
# Runs the command line after replacing a function of scclr by one that raises a signal or an error at its n-th call.
HOOK = """
import importlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
module, name, count, action, rank = os.environ["FAULT"].split()
module = importlib.import_module(module)
plain, calls = getattr(module, name), []
def hooked(*args, **named):
    calls.append(0)
    if len(calls) == int(count) and os.environ.get("RANK", "0") == rank:
        if action == "raise":
            raise ValueError("a fault of one process")
        os.kill(os.getpid(), getattr(signal, action))
    return plain(*args, **named)
setattr(module, name, hooked)
if __name__ == "__main__":
    from scclr.cli import dispatch
    sys.exit(dispatch(["train", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    processes.kill_started()


def start(
    folder: Path, *words: str, hook: tuple[str, str, int, str, int] | None = None, **env: str
) -> subprocess.Popen:
    """``scclr train`` with these words."""
    environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **env}
    command = ["-m", "scclr", "train"]
    if hook is not None:
        (folder.parent / "hook.py").write_text(HOOK)  # a file: processes that are spawned run it again
        command = [str(folder.parent / "hook.py")]
        environment["FAULT"] = " ".join(map(str, hook))
    return processes.start([sys.executable, *command, *words], folder, **environment)


def run_of(folder: Path) -> Path:
    (run,) = (folder / "runs" / "default").glob("*/")
    return run


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbs, and its seconds."""
    folder, clock = tmp_path_factory.mktemp("whole"), time.monotonic()
    finish(start(folder, *LINE))
    return run_of(folder), time.monotonic() - clock


def same(run: Path, other: Path) -> None:
    """Equal but for timings; the weights and the state of the optimizer bit by bit."""
    assert rows_of(run) == rows_of(other)
    a, b = result_of(run), result_of(other)
    for result in (a, b):
        result.pop("seconds")
        result["last"].pop("pretrain/images_per_second")
        result["versions"].pop("git")  # someone may commit while the tests run
    assert a == b
    ours, theirs = ((saved["model"], saved["optimizer"]["state"]) for saved in (load(run), load(other)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


KILLS = [
    ("os", "fsync", 11),  # the second checkpoint is written, under its temporary name
    ("os", "replace", 6),  # before the first of its two renames
    ("os", "replace", 7),  # between them
    ("scclr.evaluate.probe", "probe_encoder", 2),
    ("scclr.evaluate.probe", "probe_pixels", 1),
    ("scclr.train", "knn_accuracy", 2),
    ("scclr.run.machine", "describe", 1),  # everything is done but result.json
]


def kill_at(moment: float, folder: Path) -> None:
    """Start a run and kill it; sooner, if it was finished by then."""
    process = start(folder, *LINE)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        finish(process, -signal.SIGKILL)
        return
    finish(process)
    shutil.rmtree(folder / "runs")
    kill_at(0.8 * moment, folder)


def test_a_killed_run_is_finished_by_typing_it_again(whole: tuple[Path, float], tmp_path: Path, full: bool) -> None:
    run, seconds = whole
    draw = random.Random(0)
    for number, kill in enumerate([*KILLS, *[None] * 13] if full else [KILLS[2]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if kill is not None:
            finish(start(folder, *LINE, hook=(*kill, "SIGKILL", 0)), -signal.SIGKILL)
        else:
            kill_at(draw.uniform(0.4, 0.95) * seconds, folder)
        finish(start(folder, *LINE))
        same(run_of(folder), run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_step_and_saves(name: str, whole: tuple[Path, float], tmp_path: Path, full: bool) -> None:
    in_full_form(full or name == "SIGUSR1")
    err = finish(start(tmp_path, *LINE, hook=(*STEPS, 38, name, 0)), 130 if name == "SIGINT" else STOPPED)
    assert "type the same command to go on" in err
    assert load(run_of(tmp_path))["step"] == 38, "the step was finished and saved"
    finish(start(tmp_path, *LINE))
    same(run_of(tmp_path), whole[0])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 240 images of 2 classes."""
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(240):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_to_the_whole_group_spares_what_reads_images(
    nproc: int, photographs: Path, tmp_path: Path, full: bool
) -> None:
    """The group has the command, its processes, and the workers of these; torchrun then signals once more."""
    in_full_form(full or nproc == 1)
    draw, keys = random.Random(nproc), [word for word in LINE if not word.startswith("dataset")]
    keys += ["dataset=imagefolder", f"dataset.root={photographs}", "dataset.image_size=16", "dataset.workers=2"]
    keys += ["dataset.in_memory=false", "augment=crop", "pretrain.knn_every=0", "pretrain.epochs=30", f"nproc={nproc}"]
    for number in range(20 if full else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = start(folder, *keys)
        until(lambda folder=folder: list(folder.glob("runs/*/*/previous.pt")), 180)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.5))
        before = load(run_of(folder))["step"]
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(draw.uniform(0, 0.2))
        err = finish(process, STOPPED)
        assert last_line(err) == "stopped by SIGTERM; type the same command to go on"
        assert "Traceback" not in err
        assert "Warning" not in err
        saved = load(run_of(folder))["step"]
        assert before <= saved < 60
        assert not (run_of(folder) / "error.txt").exists()
        process = start(folder, *keys)
        until(lambda process=process: process.poll() is not None, 180)  # type: ignore[misc]
        finish(process)
        assert [row["step"] for row in rows_of(run_of(folder))] == list(range(5, 61, 5))


@pytest.mark.parametrize("moment", [("scclr.components", "prepare"), ("scclr.train", "check_data")])
def test_a_signal_before_the_training_means_the_same(moment: tuple[str, str], tmp_path: Path, full: bool) -> None:
    in_full_form(full)
    err = finish(start(tmp_path, *LINE, hook=(*moment, 1, "SIGTERM", 0)), STOPPED)
    assert err == "stopped by SIGTERM; type the same command to go on\n"


@pytest.mark.parametrize(
    ("action", "code", "step", "message"),
    [
        ("raise", 1, 8, "rank 1: ValueError: a fault of one process"),
        ("SIGKILL", 1, 8, "rank 1 was killed by SIGKILL"),
        ("SIGTERM", STOPPED, 10, "stopped by a signal to one of its processes"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_message(
    action: str, code: int, step: int, message: str, tmp_path: Path, full: bool
) -> None:
    in_full_form(full or action == "SIGKILL")
    line = [*LINE, "nproc=2", "pretrain.epochs=6"]
    assert message in last_line(finish(start(tmp_path, *line, hook=(*STEPS, 9, action, 1)), code))
    assert load(run_of(tmp_path))["step"] == step
    if full:
        finish(start(tmp_path, *line))
        assert result_of(run_of(tmp_path))["metrics"]["logreg-v1/top1"] > 0.3


def test_damage_is_never_loaded_and_costs_one_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    for step in (1, 2):
        save(tmp_path, checkpoint_files.state(step))
    path, times = tmp_path / GENERATIONS[0], 50
    intact = path.read_bytes()
    damaged = [intact[: draw.randrange(len(intact))] for _ in range(times)]
    for _ in range(times):
        where = draw.randrange(len(intact))
        damaged.append(intact[:where] + bytes([intact[where] ^ 1 << draw.randrange(8)]) + intact[where + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"last\.pt"):
            load(tmp_path)
    state = resume(tmp_path)
    assert state is not None
    assert state["step"] == 1
    said = capsys.readouterr().err
    assert re.search(r"last\.pt: .*: set aside as damaged\.pt\ngoing on from previous\.pt, at step 1\n", said)
    assert (tmp_path / "damaged.pt").read_bytes() == damaged[-1]
    (tmp_path / GENERATIONS[1]).write_bytes(b"")
    with pytest.raises(UserError, match="type overwrite=true"):
        resume(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root mounts a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_mended(whole: tuple[Path, float], small_disk: Path, full: bool) -> None:
    in_full_form(full)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(20 * 2**20))
    assert "free space" in last_line(finish(start(small_disk, *LINE), 1)), "before the run"
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler"]
    filler.unlink()
    process = start(small_disk, *LINE)
    until(lambda: list(small_disk.glob("runs/*/*/previous.pt")))
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert "free space" in last_line(finish(process, 1))
    assert load(run_of(small_disk))["step"] > 0, "an intact checkpoint is left"
    filler.unlink()
    finish(start(small_disk, *LINE))
    same(run_of(small_disk), whole[0])


def test_a_dead_wandb_service_does_not_stop_a_run(whole: tuple[Path, float], tmp_path: Path) -> None:
    process = start(tmp_path, *LINE, WANDB_MODE="offline")
    until(lambda: list(tmp_path.glob("runs/*/*/last.pt")))
    until(lambda: children(process.pid, "wandb-core"))
    os.kill(children(process.pid, "wandb-core")[0], signal.SIGKILL)
    assert "W&B stopped" in finish(process)
    assert rows_of(run_of(tmp_path)) == rows_of(whole[0])


def test_locale_zone_and_home_have_no_effect(whole: tuple[Path, float], tmp_path: Path, full: bool) -> None:
    in_full_form(full)
    odd = {"LC_ALL": "C", "LANG": "tr_TR", "TZ": "Pacific/Kiritimati", "HOME": "/proc/1/nowhere"}
    finish(start(tmp_path, *LINE, WANDB_MODE="offline", **odd))
    run = run_of(tmp_path)
    assert rows_of(run) == rows_of(whole[0])
    assert result_of(run)["metrics"] == result_of(whole[0])["metrics"]


def test_output_that_nobody_reads_costs_nothing(whole: tuple[Path, float], tmp_path: Path, full: bool) -> None:
    in_full_form(full)
    line = shlex.join([sys.executable, "-m", "scclr", "train", *LINE])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    piped = ["bash", "-o", "pipefail", "-c", f"{line} 2>&1 | head -1"]
    done = subprocess.run(piped, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    same(run_of(tmp_path), whole[0])


def test_processes_of_a_run_report_the_users_error_in_one_line(
    whole: tuple[Path, float], tmp_path: Path, full: bool
) -> None:
    in_full_form(full)
    run = tmp_path / "runs" / "default" / whole[0].name
    with run_lock(run, overwrite=False):
        err = finish(start(tmp_path, *LINE, "nproc=2"), 1)
    assert err.startswith(f"scclr train: error: rank 0: {run.relative_to(tmp_path)}: another process works on this run")
    assert len(err.splitlines()) == 1
    assert not (run / "error.txt").exists()


# ---------------------------------------------------------------- sweeps

SWEEP = ["-m", "seed=0,1,2,3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *LINE]


def points_at_work(folder: Path) -> dict[Path, int]:
    """The run folders of two points that have saved, and the numbers of their processes."""
    until(lambda: len(list(folder.glob("runs/*/*/last.pt"))) == 2)
    return {path.parent: int(path.read_text().split()[1]) for path in folder.glob("runs/*/*/.holder")}


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", STOPPED), ("SIGINT", 130)])
def test_a_signal_to_a_sweep_saves_what_runs(
    name: str, code: int, whole: tuple[Path, float], tmp_path: Path, full: bool
) -> None:
    in_full_form(full or name == "SIGTERM")
    process = start(tmp_path, *SWEEP)
    running = points_at_work(tmp_path)
    steps = {run: load(run)["step"] for run in running}
    os.killpg(process.pid, getattr(signal, name))
    err = finish(process, code)
    assert "type the same command to go on" in last_line(err)
    assert "Traceback" not in err
    runs = sorted((tmp_path / "runs" / "default").glob("*/"))
    assert runs == sorted(running), "no other point has started"
    assert all(load(run)["step"] >= step for run, step in steps.items())
    assert not list(tmp_path.glob("runs/*/*/error.txt"))
    finish(start(tmp_path, *SWEEP))
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 4
    same(tmp_path / "runs" / "default" / whole[0].name, whole[0])


def test_a_killed_point_costs_itself_only(tmp_path: Path, full: bool) -> None:
    in_full_form(full)
    process = start(tmp_path, *SWEEP)
    run, number = next(iter(points_at_work(tmp_path).items()))
    os.kill(number, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "4 points: 3 done, 1 failed" in out
    assert f"({run.relative_to(tmp_path)}): killed by SIGKILL; type the command again" in last_line(out)
    finish(start(tmp_path, *SWEEP))
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 4

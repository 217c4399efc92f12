"""Processes that work at the same time: what an error in one of them, or a signal, does to the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import processes
import pytest
from processes import children, ended, finish, in_full_form, until

from scclr.pretrain.state import NotFiniteError

pytestmark = pytest.mark.slow
# Runs the points a, b, c, d two at a time. Each leaves its process number, and how it ended, in a file of its name.
SWEEP = """
import os, sys, time
from pathlib import Path
import torch
from scclr.run.parallel import run_points
from scclr.run.preemption import Stop

def work(point):
    Path(f"{point}.pid").write_text(f"{os.getpid()} {torch.get_num_threads()}")
    try:
        end = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < end and not Path(f"{point}.end").exists():
            time.sleep(0.01)
    except BaseException as error:
        time.sleep(0.5)  # a second signal in this time would interrupt it
        Path(f"{point}.saved").write_text(type(error).__name__)
        raise
    Path(f"{point}.done").touch()

def killed(point, name):
    Path(f"{point}.killed").write_text(name)

if __name__ == "__main__":
    try:
        with Stop():
            run_points(work, ["a", "b", "c", "d"], 2, killed=killed, preload=["scclr.run.launch"])
    except KeyboardInterrupt:
        sys.exit(130)
"""
# Launches ranks 0 and 1 of one run, of which rank 1 does what the command line says while rank 0 waits.
RUN = """
import os, signal, sys, time
from pathlib import Path
from scclr.config.errors import UserError
from scclr.pretrain.state import NotFiniteError
from scclr.run.launch import launch

def work(action):
    Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1" and action == "UserError":
        raise UserError("give another alpha")
    if os.environ["RANK"] == "1" and action == "NotFiniteError":
        raise NotFiniteError(7)
    if os.environ["RANK"] == "1" and action == "ZeroDivisionError":
        1 / 0
    if os.environ["RANK"] == "1" and action == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        time.sleep(60 if action else 0)
    finally:
        time.sleep(0.5)
        Path(f"{os.environ['RANK']}.saved").touch()

if __name__ == "__main__":
    try:
        launch(work, sys.argv[1], 2)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture(autouse=True)
def _nothing_left(folder: Path) -> Iterator[None]:
    yield
    processes.kill_started()
    for path in folder.glob("*.pid"):
        until(partial(ended, pid(folder, path.stem)))


def start(folder: Path, script: str, word: str, *before: str) -> subprocess.Popen:
    (folder / "script.py").write_text(script)
    (folder / "t").mkdir()
    line = [*before, "env", "-u", "OMP_NUM_THREADS", sys.executable, "script.py", word]
    return processes.start(line, folder, TMPDIR=str(folder / "t"))


def pid(folder: Path, name: str) -> int:
    """The number of the process of a point or rank, once it is at work."""
    path = folder / f"{name}.pid"
    until(lambda: path.exists() and path.read_text())
    return int(path.read_text().split()[0])


def server(parent: int) -> int:
    """The number of the process from which the points are forked, once there is one."""
    until(lambda: children(parent, "forkserver"))
    return children(parent, "forkserver")[0]


def endings(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".saved", ".done", ".killed")}


def test_every_point_runs_with_its_share_of_the_cores(folder: Path) -> None:
    assert finish(start(folder, SWEEP, "0.1")) == ""
    assert endings(folder) == {"a.done", "b.done", "c.done", "d.done"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all((folder / f"{point}.pid").read_text().endswith(f" {threads}") for point in "abcd")


@pytest.mark.parametrize("to", ["process", "group"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize(("script", "at_work"), [(SWEEP, "ab"), (RUN, "01")], ids=["sweep", "run"])
def test_a_signal_saves_what_runs_and_starts_nothing(
    script: str, at_work: str, name: str, to: str, folder: Path, full: bool
) -> None:
    short = {SWEEP: [("SIGTERM", "process"), ("SIGINT", "group")], RUN: [("SIGHUP", "group")]}
    in_full_form(full or (name, to) in short[script])
    process = start(folder, script, "60")
    numbers = [pid(folder, one) for one in at_work]
    (os.killpg if to == "group" else os.kill)(process.pid, getattr(signal, name))
    err = finish(process, 130 if name == "SIGINT" else 75)
    assert all(ended(number) for number in numbers), "the parent waited for them"
    assert endings(folder) == {f"{one}.saved" for one in at_work}
    assert not (folder / "c.pid").exists()
    assert err == ("" if name == "SIGINT" else f"stopped by {name}; type the same command to go on\n")


def test_a_signal_to_the_group_before_the_first_point_runs(folder: Path, full: bool) -> None:
    in_full_form(full)
    process = start(folder, SWEEP, "60")
    server(process.pid)
    os.killpg(process.pid, signal.SIGHUP)
    finish(process, 75)
    assert list(folder.glob("*.pid")) == []


@pytest.mark.parametrize(("name", "ending"), [("SIGKILL", "a.killed"), ("SIGTERM", "a.saved")])
def test_a_process_that_is_killed_or_stopped_costs_its_point_only(
    name: str, ending: str, folder: Path, full: bool
) -> None:
    in_full_form(full or name == "SIGKILL")
    process = start(folder, SWEEP, "60")
    os.kill(pid(folder, "a"), getattr(signal, name))
    for point in "bcd":
        pid(folder, point)
        (folder / f"{point}.end").touch()
    finish(process)
    assert endings(folder) == {ending, "b.done", "c.done", "d.done"}
    assert (folder / ending).read_text() == {"SIGKILL": "SIGKILL", "SIGTERM": "SystemExit"}[name]


def test_no_process_outlives_a_killed_parent(folder: Path) -> None:
    process = start(folder, SWEEP, "60")
    numbers = [pid(folder, "a"), pid(folder, "b"), server(process.pid)]
    process.kill()
    for number in numbers:
        until(partial(ended, number), 20)
    assert endings(folder) == {"a.saved", "b.saved"}


def test_a_killed_server_costs_nothing(folder: Path, full: bool) -> None:
    in_full_form(full)
    process = start(folder, SWEEP, "60")
    numbers = [pid(folder, point) for point in "ab"]
    os.kill(server(process.pid), signal.SIGKILL)
    time.sleep(0.5)
    assert not any(ended(number) for number in numbers)
    for point in "acd":
        (folder / f"{point}.end").touch()
    until((folder / "d.done").exists)
    assert process.poll() is None, "it waits for b"
    os.kill(process.pid, signal.SIGTERM)
    finish(process, 75)
    assert endings(folder) == {"a.done", "b.saved", "c.done", "d.done"}


ERRORS = {
    "": "",
    "UserError": "error: rank 1: give another alpha\n",
    "NotFiniteError": f"error: rank 1: {NotFiniteError(7)}\n",
    "ZeroDivisionError": "error: rank 1: ZeroDivisionError: division by zero\n",
    "SIGKILL": "error: rank 1 was killed by SIGKILL; type the command again to go on from the last checkpoint\n",
}


@pytest.mark.parametrize("action", ERRORS)
def test_an_error_of_one_rank_is_one_line(action: str, folder: Path, full: bool) -> None:
    in_full_form(full or action == "UserError")
    err = finish(start(folder, RUN, action), 1 if action else 0)
    if action == "ZeroDivisionError":
        assert err.count("Traceback") == 1
        err = err.splitlines(keepends=True)[-1]
    assert err == ERRORS[action]
    assert list((folder / "t").iterdir()) == [], "nothing is left of the agent"
    assert all(ended(pid(folder, path.stem)) for path in folder.glob("*.pid"))  # a rank may end before its work begins


def test_nohup_keeps_the_processes(folder: Path, full: bool) -> None:
    in_full_form(full)
    process = start(folder, RUN, "60", "nohup")
    numbers = [pid(folder, rank) for rank in "01"]
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert not any(ended(number) for number in [process.pid, *numbers])
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, 75)

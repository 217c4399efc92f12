"""Processes that work at the same time: what an error in one of them, or a signal, does to the others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

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
            run_points(work, ["a", "b", "c", "d"], 2, killed=killed, preload=["scclr.run.parallel"])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def in_full_form(runs: bool) -> None:
    if not runs:
        pytest.skip("in the full form")


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pid(folder: Path, point: str) -> int:
    """The number of a point's process, once it is at work."""
    path = folder / f"{point}.pid"
    until(lambda: path.exists() and path.read_text())
    return int(path.read_text().split()[0])


def server(parent: int) -> int:
    """The number of the process from which the points are forked, once there is one."""
    found: list[int] = []

    def look() -> list[int]:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        found[:] = [int(child) for child in children if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()]
        return found

    until(look)
    return found[0]


def ended(number: int) -> bool:
    """Whether a process is gone, or is only waiting for a parent to take note of its end."""
    status = Path(f"/proc/{number}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        return status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def endings(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".saved", ".done", ".killed")}


Sweep = Callable[[float], subprocess.Popen]


@pytest.fixture
def sweep(folder: Path) -> Iterator[Sweep]:
    """Starts the sweep of points that take some seconds, as the leader of a process group."""
    started: list[subprocess.Popen] = []
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def start(seconds: float) -> subprocess.Popen:
        (folder / "sweep.py").write_text(SWEEP)
        line = [sys.executable, "sweep.py", str(seconds)]
        started.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, process_group=0))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for path in folder.glob("*.pid"):
        until(partial(ended, pid(folder, path.stem)))


def test_every_point_runs_with_its_share_of_the_cores(sweep: Sweep, folder: Path) -> None:
    process = sweep(0.1)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert endings(folder) == {"a.done", "b.done", "c.done", "d.done"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all((folder / f"{point}.pid").read_text().endswith(f" {threads}") for point in "abcd")


NAMES = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]
TO = ["process", "group"]


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_stops_the_sweep_and_saves_what_runs(
    name: str, to: str, sweep: Sweep, folder: Path, full: bool
) -> None:
    in_full_form(full or (name, to) in (("SIGTERM", "process"), ("SIGINT", "group")))
    process = sweep(60)
    numbers = [pid(folder, point) for point in "ab"]
    (os.killpg if to == "group" else os.kill)(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if name == "SIGINT" else 75)
    assert all(ended(number) for number in numbers), "the parent waited for them"
    assert endings(folder) == {"a.saved", "b.saved"}
    assert not (folder / "c.pid").exists()
    assert err == ("" if name == "SIGINT" else f"stopped by {name}; type the same command to go on\n")


def test_a_signal_to_the_group_before_the_first_point_runs(sweep: Sweep, folder: Path, full: bool) -> None:
    in_full_form(full)
    process = sweep(60)
    server(process.pid)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(30) == 75
    assert list(folder.glob("*.pid")) == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_killed_or_stopped_costs_its_point_only(
    name: str, sweep: Sweep, folder: Path, full: bool
) -> None:
    in_full_form(full or name == "SIGKILL")
    process = sweep(60)
    os.kill(pid(folder, "a"), getattr(signal, name))
    for point in "bcd":
        pid(folder, point)
        (folder / f"{point}.end").touch()
    assert process.wait(30) == 0
    assert endings(folder) == {"a.killed" if name == "SIGKILL" else "a.saved", "b.done", "c.done", "d.done"}
    if name == "SIGKILL":
        assert (folder / "a.killed").read_text() == "SIGKILL"


def test_no_process_outlives_a_killed_parent(sweep: Sweep, folder: Path) -> None:
    process = sweep(60)
    numbers = [pid(folder, "a"), pid(folder, "b"), server(process.pid)]
    process.kill()
    for number in numbers:
        until(partial(ended, number), 20)
    assert endings(folder) == {"a.saved", "b.saved"}


def test_a_killed_server_costs_nothing(sweep: Sweep, folder: Path, full: bool) -> None:
    in_full_form(full)
    process = sweep(60)
    numbers = [pid(folder, point) for point in "ab"]
    os.kill(server(process.pid), signal.SIGKILL)
    time.sleep(0.5)
    assert not any(ended(number) for number in numbers)
    for point in "acd":
        (folder / f"{point}.end").touch()
    until((folder / "d.done").exists)
    assert process.poll() is None, "it waits for b"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 75
    assert endings(folder) == {"a.done", "b.saved", "c.done", "d.done"}


# ---------------------------------------------------------------- the processes of one run

# Two processes, of which rank 1 does what the command line says while rank 0 waits.
RUN = """
import os, signal, sys, time
from pathlib import Path
from scclr.config.errors import UserError
from scclr.run.launch import launch

def work(action):
    Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1" and action == "UserError":
        raise UserError("give another alpha")
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


@pytest.fixture
def run(folder: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the two processes."""
    started: list[subprocess.Popen] = []

    def start(action: str, *before: str) -> subprocess.Popen:
        (folder / "run.py").write_text(RUN)
        line = [*before, sys.executable, "run.py", action]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir()
        started.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, process_group=0))
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


ERRORS = {
    "": "",
    "UserError": "error: rank 1: give another alpha\n",
    "ZeroDivisionError": "error: rank 1: ZeroDivisionError: division by zero\n",
    "SIGKILL": "error: rank 1 was killed by SIGKILL; type the command again to go on from the last checkpoint\n",
}


@pytest.mark.parametrize("action", ERRORS)
def test_an_error_of_one_process_is_one_line(
    action: str, run: Callable[..., subprocess.Popen], folder: Path, full: bool
) -> None:
    in_full_form(full or action == "UserError")
    process = run(action)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (1 if action else 0)
    if action == "ZeroDivisionError":
        assert err.count("Traceback") == 1
        err = err.splitlines(keepends=True)[-1]
    assert err == ERRORS[action]
    assert list((folder / "tmp").iterdir()) == [], "nothing is left of the agent"
    assert all(ended(pid(folder, rank)) for rank in "01")


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_lets_every_process_save(
    name: str, to: str, run: Callable[..., subprocess.Popen], folder: Path, full: bool
) -> None:
    in_full_form(full or (name, to) == ("SIGHUP", "group"))
    process = run("wait")
    numbers = [pid(folder, rank) for rank in "01"]
    (os.killpg if to == "group" else os.kill)(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if name == "SIGINT" else 75)
    assert all((folder / f"{rank}.saved").exists() for rank in "01")
    assert all(ended(number) for number in numbers)
    assert err == ("" if name == "SIGINT" else f"stopped by {name}; type the same command to go on\n")


def test_nohup_keeps_the_processes(run: Callable[..., subprocess.Popen], folder: Path, full: bool) -> None:
    in_full_form(full)
    process = run("wait", "nohup")
    numbers = [pid(folder, rank) for rank in "01"]
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert not any(ended(number) for number in [process.pid, *numbers])
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 75

"""Processes that tests start, send signals to, and wait for."""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

STARTED: list[subprocess.Popen] = []


def start(line: list[str], folder: Path, **env: str) -> subprocess.Popen:
    """A process in ``folder`` that leads a process group of its own. ``kill_started`` ends it at the latest.

    It starts a W&B service of its own, whether or not an earlier test has left one in this process.
    """
    out, environment = subprocess.PIPE, {**os.environ, **env}
    environment.pop("WANDB_SERVICE", None)
    STARTED.append(
        subprocess.Popen(line, cwd=folder, env=environment, stdout=out, stderr=out, text=True, process_group=0)
    )
    return STARTED[-1]


def kill_started() -> None:
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Standard error of a process that ends with ``code`` within a minute."""
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return err


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(number: int) -> bool:
    """Whether a process is gone, or is only waiting for a parent to take note of its end."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def children(parent: int, command: str) -> list[int]:
    """The numbers of the processes that ``parent`` has started with this word in their command line."""
    found = []
    for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            if command in Path(f"/proc/{number}/cmdline").read_text():
                found.append(int(number))
    return found


def in_full_form(runs: bool) -> None:
    """Skip the test unless it belongs to the short form too, or the full form was asked for."""
    if not runs:
        pytest.skip("in the full form")

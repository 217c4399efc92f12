"""The points of a sweep: which of them are done, running, failed, stopped or missing, and how long they take."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from scclr.config.errors import UserError, require
from scclr.run.files import GENERATIONS, folder_error, read_bytes, read_json, remove_partials, write_json, write_text
from scclr.run.lock import HeldError, file_lock, is_locked
from scclr.run.result import read_result

STATES = ("done", "running", "failed", "stopped", "missing")
RECORD, LOCK = "sweep.json", ".sweep.lock"
LONGEST = 500  # characters of a reason or of a point's words that are shown
LOCK_SECONDS = 60  # another sweep holds the lock for some milliseconds


class Point(NamedTuple):
    """A run folder, and the words that the sweep adds to its command line for it."""

    directory: Path
    words: str

    @property
    def state(self) -> str:
        """One of ``STATES``. ``stopped`` has a checkpoint to go on from, ``missing`` has none."""
        with suppress(UserError, OSError):  # a damaged result is none
            read_result(self.directory)
            return "done"
        if is_locked(self.directory):
            return "running"
        if (self.directory / "error.txt").exists():
            return "failed"
        return "stopped" if any((self.directory / name).exists() for name in GENERATIONS) else "missing"

    @property
    def seconds(self) -> float:
        """How long the run has taken, up to its end or its last checkpoint; 0 if that is not known."""
        with suppress(UserError, OSError):
            return float(read_result(self.directory)["seconds"]["total"])
        with suppress(UserError, OSError):
            from scclr.run.checkpoint import load  # only a checkpoint needs torch, which takes seconds to import

            return float(load(self.directory)["seconds"])
        return 0.0


def devices() -> list[str]:
    """The CUDA devices that this process sees, in the words of ``CUDA_VISIBLE_DEVICES``."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(map(str, range(count))) if named is None else [name.strip() for name in named.split(",")][:count]


def divided(jobs: int, *, cores: int, names: Sequence[str], each: int) -> tuple[int, list[str]]:
    """(how many points ``hydra.launcher.n_jobs`` runs at the same time, the CUDA devices of each of these).

    Args:
        jobs: -1 is one on each core or, where there are CUDA devices, on each share of these; -2 is one fewer.
        names: of the CUDA devices, if the points use them.
        each: the processes of a point, one for each device of a share.

    Raises:
        UserError: there are too few devices.
    """
    shares = [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]
    most, wanted = len(shares) if names else cores, f" of nproc={each}" if each > 1 else ""
    message = f"hydra.launcher.n_jobs={jobs}: {len(names)} CUDA devices are enough for {most} runs{wanted} at once"
    require(not names or jobs <= most, f"{message}; type hydra.launcher.n_jobs={most}")
    return jobs if jobs > 0 else max(1, most + 1 + jobs), shares


@contextmanager
def own_devices(folder: str, shares: Sequence[str]) -> Iterator[None]:
    """Let this process see the first of ``shares`` that is free, for its CUDA and that of its child processes.

    A share is taken by a lock in ``folder``, which the kernel frees when the process ends, also if it is killed.
    """
    with ExitStack() as stack:
        while True:
            for i, share in enumerate(shares):
                try:
                    stack.enter_context(file_lock(Path(folder, f"{i}.lock"), 0))
                except HeldError:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = share
                yield
                return
            time.sleep(0.1)  # a process that was killed has not quite ended


def fail(directory: Path, message: str) -> None:
    """Leave ``message`` in the run folder as ``error.txt``, where a report of the sweep finds it."""
    with suppress(OSError):  # a full disk does not take it; it has been printed
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "error.txt", f"{message}\n")


def remember(points: Sequence[Point]) -> None:
    """Add the points to ``sweep.json`` beside their folders, which holds those of all sweeps.

    Raises:
        UserError: ``sweep.json`` is damaged or cannot be written, or another process does not let go of it.
    """
    for folder in {point.directory.parent for point in points}:
        new = {point.directory.name: point.words for point in points if point.directory.parent == folder}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(folder / LOCK, LOCK_SECONDS):
                remove_partials(folder)
                write_json(folder / RECORD, {**remembered(folder), **new})
        except OSError as error:
            raise folder_error(error, folder) from error


def remembered(folder: Path) -> dict[str, str]:
    """What ``sweep.json`` of a folder of runs holds: the words of each point, by the name of its run folder.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD
    try:
        known = read_json(path)
    except FileNotFoundError:
        return {}
    for name, words in known.items():
        plain = name not in ("", ".", "..") and "/" not in name and name.isprintable() and isinstance(words, str)
        require(plain, f"{path}: damaged (a point without its folder or words); delete it and type the command again")
    return known


def points_of(folder: Path) -> list[Point]:
    """Every run of a folder of runs: the points of its sweeps, and runs that belong to none.

    Raises:
        UserError: the record of its sweeps is damaged.
    """
    swept = remembered(folder) if folder.is_dir() else {}
    files = sorted({*folder.glob("*/config.yaml"), *folder.glob("*/result.json")})
    others = {path.parent.name: "" for path in files if path.parent.name not in swept}
    return [Point(folder / name, words) for name, words in {**swept, **others}.items()]


def status(folder: Path) -> list[str]:
    """Lines about every run of a folder of runs.

    Raises:
        UserError: there are none, or a file about them is damaged.
    """
    points = points_of(folder)
    require(len(points) > 0, f"{folder}: no runs; give a folder such as runs/default")
    for point in points:
        with suppress(FileNotFoundError):
            read_result(point.directory)
    spent = clock(sum(point.seconds for point in points))
    return [f"{folder}: {count(points)}", f"{spent} so far{_outlook(points, at_once=1)}", *listed(points)]


def before(points: Sequence[Point], *, at_once: int) -> str:
    """The line that a sweep begins with, if ``at_once`` of its points run at the same time."""
    return f"{count(points)}{_outlook(points, at_once=at_once)}"


def count(points: Sequence[Point]) -> str:
    """How many points are in each state."""
    states = Counter(point.state for point in points)
    return f"{len(points)} points: " + ", ".join(f"{states[s]} {s}" for s in STATES if states[s] or s == "done")


def listed(points: Sequence[Point]) -> list[str]:
    """A line for each point that is not done: its state, words and folder, and the reason if it failed."""
    lines = []
    for point in points:
        if (state := point.state) != "done":
            reason = f": {_error(point)}" if state == "failed" else ""
            lines.append(f"  {state:<8} {_brief(point.words or point.directory.name)} ({point.directory}){reason}")
    return lines


def _error(point: Point) -> str:
    with suppress(UserError, OSError):  # the next attempt may delete it meanwhile
        return _brief(read_bytes(point.directory / "error.txt").decode(errors="replace"))
    return "the reason was deleted"


def _brief(text: str) -> str:
    """``text`` as part of a line: without line breaks and other control characters, and not endless."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."


def _outlook(points: Sequence[Point], *, at_once: int) -> str:
    """How long the other points may take, judged by the finished ones, or by finished runs in the same folder."""
    finished = [point for point in points if point.state == "done"]
    rest = len(points) - len(finished)
    if rest == 0:
        return ""
    if not finished:
        paths = {path for point in points for path in point.directory.parent.glob("*/result.json")}
        finished = [point for path in sorted(paths) if (point := Point(path.parent, "")).state == "done"]
    if not finished:
        return "; no finished run beside them tells how long they take"
    each = sum(point.seconds for point in finished) / len(finished)
    total = each * math.ceil(rest / at_once)
    return f"; about {clock(each)} each and {clock(total)} for all, as in {len(finished)} finished runs"


def clock(seconds: float) -> str:
    """A duration to read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

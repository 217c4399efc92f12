"""The points of a sweep: which are done, running, failed, stopped or missing, and what they cost."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from scclr.checkpoint import GENERATIONS, held, load, write_atomic
from scclr.config import UserError, require

STATES = ("done", "running", "failed", "stopped", "missing")


class Point(NamedTuple):
    """A run folder, and the words that the sweep adds to its command line for it."""

    directory: Path
    words: str

    @property
    def state(self) -> str:
        """``stopped`` has a checkpoint to go on from; ``missing`` has not begun, or has none yet."""
        if (self.directory / "result.json").exists():
            return "done"
        if held(self.directory):
            return "running"
        if (self.directory / "error.txt").exists():
            return "failed"
        return "stopped" if any((self.directory / name).exists() for name in GENERATIONS) else "missing"

    @property
    def seconds(self) -> float:
        """What the run took so far, as far as its last checkpoint."""
        with suppress(OSError):
            result = json.loads((self.directory / "result.json").read_text())
            return float(result["seconds"]["total"])
        with suppress(UserError, OSError):
            return float(load(self.directory)["seconds"])
        return 0.0


def fail(directory: Path, message: str) -> None:
    """Leave ``message`` in the run folder as ``error.txt``, where a report of the sweep finds it."""
    with suppress(OSError):  # on a full disk the line on standard error is all there is
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "error.txt", lambda file: file.write(f"{message}\n".encode()))


def remember(points: Sequence[Point]) -> None:
    """Note the points in ``sweep.json`` beside their folders, with those of earlier sweeps."""
    for folder in {point.directory.parent for point in points}:
        folder.mkdir(parents=True, exist_ok=True)
        known = {point.directory.name: point.words for point in remembered(folder)}
        known |= {point.directory.name: point.words for point in points if point.directory.parent == folder}
        text = json.dumps(known, indent=2)
        write_atomic(folder / "sweep.json", lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def remembered(folder: Path) -> list[Point]:
    """The points in ``sweep.json`` of a folder of runs; none without it."""
    path = folder / "sweep.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return [Point(folder / name, words) for name, words in known.items()]


def status(folder: Path) -> list[str]:
    """Lines on every run of a folder of runs.

    Raises:
        UserError: there are none.
    """
    swept = remembered(folder)
    names = {point.directory for point in swept}
    others = [Point(path.parent, "") for path in sorted(folder.glob("*/config.yaml")) if path.parent not in names]
    points = swept + others
    require(len(points) > 0, f"{folder}: no runs; give a folder such as runs/default")
    return [f"{folder}: {count(points)}", f"{_spent(points)} so far{_outlook(points, at_once=1)}", *listed(points)]


def before(points: Sequence[Point], *, at_once: int) -> str:
    """The line that a sweep begins with; ``at_once`` points run side by side."""
    return f"{count(points)}{_outlook(points, at_once=at_once)}"


def count(points: Sequence[Point]) -> str:
    """How many points are in which state."""
    states = Counter(point.state for point in points)
    return f"{len(points)} points: " + ", ".join(f"{states[s]} {s}" for s in STATES if states[s] or s == "done")


def listed(points: Sequence[Point]) -> list[str]:
    """A line for each point that is not done: its state, words, folder, and why it failed."""
    lines = []
    for point in points:
        if (state := point.state) != "done":
            why = f": {(point.directory / 'error.txt').read_text().strip()}" if state == "failed" else ""
            lines.append(f"  {state:<8} {point.words or point.directory.name} ({point.directory}){why}")
    return lines


def _outlook(points: Sequence[Point], *, at_once: int) -> str:
    """How long the rest may take, from what the finished ones took, here or else in the same folder."""
    finished = [point for point in points if point.state == "done"]
    rest = len(points) - len(finished)
    if rest == 0:
        return ""
    if not finished:
        paths = {path for point in points for path in point.directory.parent.glob("*/result.json")}
        finished = [Point(path.parent, "") for path in sorted(paths)]
    if not finished:
        return "; no finished run beside them tells how long they take"
    each = sum(point.seconds for point in finished) / len(finished)
    rounds = -(-rest // min(rest, at_once))
    return f"; about {clock(each)} each and {clock(each * rounds)} for all, as in {len(finished)} finished runs"


def _spent(points: Sequence[Point]) -> str:
    return clock(sum(point.seconds for point in points))


def clock(seconds: float) -> str:
    """A time to read."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""``scclr report``: what the runs of a folder say, as a page with tables, statistics and figures.

``runs`` reads the folders, ``words`` finds the command of a run, ``statistics`` and ``study`` compare, ``answer`` makes
sentences of that, ``figures``, ``geometry``, ``curves``, ``single`` and ``encoded`` draw, ``page`` puts all on a page,
and ``logged`` sends that to W&B.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from scclr.config.errors import require
from scclr.report import drawing
from scclr.report.curves import trainings
from scclr.report.drawing import Picture
from scclr.report.figures import comparisons
from scclr.report.geometry import embeddings
from scclr.report.page import content, render, table_of_runs
from scclr.report.runs import find
from scclr.report.single import figures, theory
from scclr.report.study import Study, study
from scclr.run.files import folder_error, write_atomic, write_text
from scclr.run.sweep import before

LIBRARIES = ("jinja2", "matplotlib", "pandas")
SECONDS, IDLE_SECONDS = 20.0, 600.0  # between two looks at a sweep; without a run before it counts as over


class Report(NamedTuple):
    """A report that is written: its page ``report.html``, what it says, and its figures, which lie beside the page."""

    page: Path
    study: Study
    pictures: Sequence[Picture]


def write(
    folders: Sequence[Path],
    metric: str | None = None,
    baseline: Mapping[str, str] | None = None,
    *,
    refresh: int = 0,
) -> Report:
    """Write ``report.html``, ``report.md``, ``results.csv``, and each figure as SVG and PNG.

    They come to lie in ``<folder>/report``, of two folders in ``<first>/report-<name of the second>``.

    Args:
        folders: one or two folders of runs, or a run folder.
        metric: the number that is compared; None takes the accuracy that most runs have.
        baseline: what the others are compared with, by key; see ``study``.
        refresh: seconds after which the page loads itself again; 0 never.

    Raises:
        UserError: a library of the extra ``report`` is not installed, there are no finished runs, no run has the metric
            or the baseline, or the folder cannot be written.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    require(not missing, f"a report needs {', '.join(missing)}: pip install 'scclr[report]'")
    found = find(folders)
    waiting = before(found.points, at_once=1)
    require(len(found.runs) > 0, f"{folders[0]}: no finished run yet ({waiting}); type scclr sweep-status {folders[0]}")
    made = study(found.runs, metric, baseline)
    rows, notes = [], list[str]()
    with drawing.style():
        pictures = [picture for maker in (comparisons, embeddings, trainings) for picture in maker(made)]
        if len(made.runs) == 1:
            own, notes = figures(made.runs[0])
            pictures, rows = [*own, *pictures], theory(made.runs[0].directory)
    values = content(found, made, pictures, rows, notes, refresh)
    target = folders[0] / ("report" if len(folders) == 1 else f"report-{folders[1].resolve().name}")
    try:
        target.mkdir(exist_ok=True)
        for picture in pictures:
            write_text(target / f"{picture.name}.svg", picture.svg)
            write_atomic(target / f"{picture.name}.png", partial(_put, picture.png))
        write_text(target / "results.csv", table_of_runs(made))
        write_text(target / "report.md", render("page.md", values))
        write_text(target / "report.html", render("page.html", values))
    except OSError as error:
        raise folder_error(error, target) from error
    return Report(target / "report.html", made, pictures)


def _put(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def watch(
    folders: Sequence[Path],
    metric: str | None,
    baseline: Mapping[str, str] | None,
    say: Callable[[str], None],
    *,
    seconds: float = SECONDS,
) -> Report:
    """``write`` again whenever a run begins or ends; returns what the last one did.

    This ends when every run is done or has failed, or when none has been running for ten minutes.

    Args:
        say: is told what became of the runs each time.
        seconds: between two looks.
    """
    idle = 0.0
    while True:
        found = find(folders)
        states = [point.state for point in found.points]
        waits = not {"running", "missing", "stopped"}.isdisjoint(states) and idle < IDLE_SECONDS
        if found.runs or not waits:
            written = write(folders, metric, baseline, refresh=math.ceil(seconds) if waits else 0)
        say(before(found.points, at_once=max(1, states.count("running"))))
        if not waits:
            return written
        while idle < IDLE_SECONDS and [point.state for point in found.points] == states:
            time.sleep(seconds)
            idle = 0.0 if "running" in states else idle + seconds

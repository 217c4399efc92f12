"""A report in Weights & Biases: the page, its figures and the table of configurations, as one run of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from scclr.config.errors import did_you_mean, require
from scclr.config.schema import TrackingConfig
from scclr.report import Report
from scclr.report.figures import numeric
from scclr.report.runs import Run
from scclr.report.study import Group, Study
from scclr.report.words import command
from scclr.run.tracking import check_tracking


def typed(words: Sequence[str]) -> dict[str, str | None]:
    """The values of words such as ``tracking.mode=online``, by key."""
    known = [field.name for field in fields(TrackingConfig)]
    found: dict[str, str | None] = {}
    for word in words:
        key, value = word.removeprefix("tracking.").split("=", 1)
        hint = did_you_mean(key, known) or f"; there are {', '.join(known)}"
        require(key in known, f"{word}: no such key of tracking{hint}")
        found[key] = None if value == "null" else value
    return found


def tracking(words: Mapping[str, str | None]) -> TrackingConfig:
    """Where a report is logged: as for a run, ``words`` first, then W&B's environment variables.

    Args:
        words: by the keys of ``tracking``.

    Raises:
        UserError: a value is wrong, nothing would be logged, or W&B cannot be reached.
    """
    config = TrackingConfig(**{"mode": None, "project": None, "entity": None, **words})
    require(
        config.mode != "disabled", "tracking.mode=disabled logs nothing: drop --wandb, or type tracking.mode=offline"
    )
    check_tracking(config)
    return config


def log(report: Report, config: TrackingConfig, words: Mapping[str, str | None]) -> str:
    """Log a report that is written; returns a line that says where it is.

    It is the same W&B run each time, of the job type ``report``. Its group is that of the runs, or for several
    configurations the name of their folder. Where neither ``words`` nor the environment name a project or a user, they
    are those of the runs.

    Raises:
        UserError: W&B cannot start, or stops.
    """
    from scclr.run.wandb_environment import variable
    from scclr.run.wandb_run import described, log_page

    study, folder = report.study, report.page.parent
    for key in ("project", "entity"):
        theirs = {str(found) for run in study.runs if (found := _tracked(run, key)) is not None}
        if key not in words and variable(key.upper()) is None and len(theirs) == 1:
            config = replace(config, **{key: theirs.pop()})
    groups = {str(run.result.get("group")) for run in study.runs}
    name = folder.resolve().parent.name
    settings = {"folder": str(folder.parent), "metric": study.metric, "baseline": dict(study.baseline)}
    shown = described(f"report of {name}", groups.pop() if len(groups) == 1 else name, "report", [], settings)
    captions = {picture.name: f"{picture.title}. {picture.caption}" for picture in report.pictures}
    address = log_page(folder, config, shown, report.page, captions, table(study))
    return address or f"logged offline; scclr sync {config.dir or folder} uploads it"


def _tracked(run: Run, key: str) -> Any:
    node = run.result["config"].get("tracking")
    return node.get(key) if isinstance(node, Mapping) else None


def table(study: Study) -> tuple[list[str], list[list[Any]]]:
    """(the columns, a row for each configuration): its values on the axes, and numbers as they were written."""
    columns = [*map(study.label, study.axes), study.metric, "sd", "low", "high", "seeds", "difference", "p", "command"]
    return columns, [_row(study, group) for group in study.groups]


def _row(study: Study, group: Group) -> list[Any]:
    values = [float(group.values[axis]) if numeric(study, axis) else group.values[axis] for axis in study.axes]
    one, found = group.estimate, group.difference
    low, high = one.interval or (None, None)
    words = "" if group.words is None else command(group.words, [run.seed for run in group.runs])
    return [*values, one.mean, one.sd, low, high, one.n, None if found is None else found.value, group.p, words]

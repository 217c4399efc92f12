"""A study as a page: HTML, Markdown, and a CSV with a row for each run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scclr import __version__
from scclr.report.answer import answer
from scclr.report.drawing import Picture
from scclr.report.runs import Found, Run
from scclr.report.single import Row as TheoryRow
from scclr.report.statistics import FEW, RESAMPLES, estimate
from scclr.report.study import Group, Study
from scclr.report.units import interval, number, probability, signed, titled, unit
from scclr.report.words import command, sweep
from scclr.run.result import METRIC
from scclr.run.sweep import before, clock

TEMPLATES = Path(__file__).with_name("templates")
COLUMNS = 4  # of other metrics
TITLES = {"baseline/untrained/": "untrained encoder", "baseline/pixels/": "raw pixels"}
COST = ("device", "runs", "a run", "of it pretraining", "images/s", "all runs")


class Cell(NamedTuple):
    """A number of the table; ``mark`` is ``above``, ``below`` or empty."""

    text: str
    mark: str = ""


class TableRow(NamedTuple):
    """A configuration in the table."""

    name: str
    cells: Sequence[Cell]
    command: str
    base: bool


def content(
    found: Found,
    study: Study,
    pictures: Sequence[Picture],
    theory: Sequence[TheoryRow],
    notes: Sequence[str],
    refresh: int,
) -> dict[str, Any]:
    """What the templates are filled with.

    Args:
        theory: rows of the theory of one run.
        notes: why a figure is not there.
        refresh: seconds after which the page loads itself again; 0 never.
    """
    running = sum(point.state == "running" for point in found.points)
    parts = [(group.words, [run.seed for run in group.runs]) for group in study.groups]
    known = [(words, seeds) for words, seeds in parts if words is not None]
    others = [*found.others, *(f"no {study.metric} {path}" for path in study.lacking)]
    return {
        "title": f"scclr report: {' and '.join(map(str, found.folders))}",
        "answer": answer(study),
        "status": before(found.points, at_once=max(1, running)),
        "command": sweep(known) if len(known) == len(parts) else None,
        "heading": f"{titled(study.metric)} of {len(study.groups)} configuration{'s' * (len(study.groups) > 1)}",
        "columns": columns(study),
        "rows": [row(study, group) for group in study.groups],
        "notes": " ".join(_table_notes(study)),
        "pictures": pictures,
        "figure_notes": notes,
        "theory": theory,
        "evaluated_columns": ["metric", "pretrained", *TITLES.values()],
        "evaluated": evaluated(study.runs[0].evaluations) if len(study.runs) == 1 else [],
        "cost_columns": COST,
        "cost": cost(study.runs),
        "others": others,
        "methods": _methods(study),
        "version": __version__,
        "refresh": refresh,
    }


def render(name: str, values: Mapping[str, Any]) -> str:
    """A template of this folder, filled. In HTML every value is escaped; in Markdown the filters do that."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"line": _line, "cell": lambda text: _line(text).replace("|", "\\|"), "code": _code}
    return environment.get_template(name).render(values)


def _line(text: object) -> str:
    """Text in one line of Markdown, whose signs mean nothing."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """Text between backticks in a table of Markdown."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")


def others_of(study: Study) -> list[str]:
    """The other metrics that have a column: those of the other protocols."""
    last = study.metric.rpartition("/")[2]
    names = dict.fromkeys(name for run in study.runs for name in run.result["metrics"])
    skipped = ("baseline/", "theory/")
    return [
        name
        for name in names
        if name != study.metric and name.rpartition("/")[2] in (last, "top1", "nmi") and not name.startswith(skipped)
    ][:COLUMNS]


def columns(study: Study) -> list[str]:
    """The headings of the table."""
    compared = [*(["difference", "95 % interval", "p (Holm)"] if _has_differences(study) else [])]
    few = any(group.estimate.bootstrap for group in study.groups)
    own = [f"mean ± sd{_unit(study.metric)}", "95 % interval", *(["bootstrap"] if few else []), "seeds"]
    more = [titled(name) for name in others_of(study)]
    return [*map(study.label, study.axes), *own, *compared, *more, "command"]


def row(study: Study, group: Group) -> TableRow:
    """A configuration under ``columns``."""
    metric, one, found = study.metric, group.estimate, group.difference
    mark = " (best)" if group.best else ""
    cells = [Cell(group.values[axis]) for axis in study.axes]
    cells += [Cell(f"{spread(metric, group)}{mark}"), Cell(interval(metric, one.interval))]
    if any(other.estimate.bootstrap for other in study.groups):
        cells.append(Cell(interval(metric, one.bootstrap)))
    cells.append(Cell(str(one.n)))
    if _has_differences(study):
        text = "baseline" if group.is_baseline else "-"
        if found is not None:
            text = signed(metric, found.value) + ("" if found.paired else " (unpaired)")
            text += f" {group.mark}" if group.mark else ""
        cells += [Cell(text, group.mark), Cell(interval(metric, found.interval, sign=True) if found else "-")]
        cells.append(Cell(probability(group.p)))
    cells += [Cell(spread(name, group)) for name in others_of(study)]
    seeds = [run.seed for run in group.runs]
    words = group.words
    text = "another version wrote it; see config.yaml in its folder" if words is None else command(words, seeds)
    return TableRow(study.name(group), cells, text, group.is_baseline)


def spread(metric: str, group: Group) -> str:
    """Mean and standard deviation of a metric of a group; a dash if no run has it."""
    one = group.of(metric)
    if one is None:
        return "-"
    return number(metric, one.mean) + ("" if one.sd is None else f" ± {number(metric, one.sd)}")


def evaluated(numbers: Mapping[str, float]) -> list[list[str]]:
    """What ``scclr evaluate`` has added to a run: each metric with its unit, then its value and those of the baselines.

    Args:
        numbers: by names such as ``mnist/knn-v1/top1``, with which ``--metric`` compares runs.
    """
    return [
        [
            titled(name),
            *(number(name, numbers.get(other)) for other in (name, *(of_baseline(name, one) for one in TITLES))),
        ]
        for name in numbers
        if "baseline/" not in name
    ]


def of_baseline(metric: str, baseline: str) -> str:
    """The name of a metric of a baseline, such as ``mnist/baseline/pixels/knn-v1/top1``."""
    found = METRIC.fullmatch(metric)
    data = (found["data"] if found else None) or ""
    return f"{data}{baseline}{metric.removeprefix(data)}"


def cost(runs: Sequence[Run]) -> list[list[str]]:
    """What the runs took, by device, under ``COST``."""
    lines = []
    for device in dict.fromkeys(run.device for run in runs):
        here = [run for run in runs if run.device == device]
        totals = [run.numbers["seconds/total"] for run in here]
        training = [run.numbers.get("seconds/pretrain", 0.0) for run in here]
        speed = [run.numbers[key] for run in here if (key := "pretrain/images_per_second") in run.numbers]
        one = estimate(totals)
        deviation = "" if one.sd is None else f" ± {one.sd:.0f} s"
        pace = f"{sum(speed) / len(speed):,.0f}" if speed else "-"
        mean = sum(training) / len(training)
        duration = f"{one.mean:.0f} s{deviation}"
        lines.append([device, str(len(here)), duration, f"{mean:.0f} s", pace, clock(sum(totals))])
    return lines


def table_of_runs(study: Study) -> str:
    """``results.csv``: a row for each run, with its words, all that varies, and all numbers as they were written."""
    import pandas

    rows = []
    for group in study.groups:
        for run in group.runs:
            typed = "" if group.words is None else command(group.words, [run.seed])
            named = {"directory": str(run.directory), "group": run.result.get("group", ""), "seed": run.seed}
            values = {axis: group.values[axis] for axis in study.axes if axis != "seed"}
            rows.append({**named, **values, "command": typed, "device": run.device, **run.numbers})
    return str(pandas.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def _has_differences(study: Study) -> bool:
    return any(group.difference is not None for group in study.groups)


def _unit(metric: str) -> str:
    return f", {unit(metric)}" if unit(metric) else ""


def _table_notes(study: Study) -> Iterable[str]:
    if study.axes and not study.single:
        yield "Rows differ in what the first columns name; the seed is averaged over."
    if study.single:
        yield "One seed each: no standard deviations, no intervals, no tests."
    beside = []
    for prefix, title in TITLES.items():
        values = [run.numbers[name] for run in study.runs if (name := of_baseline(study.metric, prefix)) in run.numbers]
        if values:
            one = estimate(values)
            deviation = "" if one.sd is None else f" ± {number(study.metric, one.sd)}"
            beside.append(f"{title} {number(study.metric, one.mean)}{deviation}{_unit(study.metric).lstrip(',')}")
    if beside:
        yield f"Beside that: {'; '.join(beside)}."


def _methods(study: Study) -> list[str]:
    if study.single:
        return ["One seed of each configuration: differences between rows may be chance."]
    lines = [
        "Means and standard deviations (n - 1) are over seeds. Intervals are 95 % intervals of Student's t, each for "
        f"itself; below {FEW} seeds the BCa bootstrap of {RESAMPLES:,} samples stands beside them. It is narrow for "
        "three seeds.",
    ]
    if study.baseline:
        base = ", ".join(f"{study.label(axis)} = {value}" for axis, value in study.baseline.items())
        lines.append(
            f"Differences are from the row with {base} that shares all other values: in pairs of the same seed where "
            "two or more are common, otherwise by Welch's test. 'above' and 'below' stand where p is under 0.05 after "
            "Holm's correction for all differences in the table."
        )
    lines.append(
        "'best' stands where the interval of the difference from each other row of the same setting lies on the "
        "better side of 0. Where all pairs differ by the same amount, there is no interval and no p: with so few "
        "seeds nothing tells that from chance."
    )
    return lines

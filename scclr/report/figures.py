"""The figures that compare configurations. Each is None where the runs lack what it shows."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from scclr.report import drawing
from scclr.report.drawing import INK, Picture
from scclr.report.statistics import Estimate
from scclr.report.study import Group, Study
from scclr.report.units import factor, interval, titled, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EDGES = {"alpha_mis": "forecast/alpha_mis", "alpha_c": "theory/alpha_c", "alpha_col": "forecast/alpha_col"}
SIGNS = {"alpha_mis": r"$\alpha_{mis}$", "alpha_c": r"$\alpha_c$", "alpha_col": r"$\alpha_{col}$"}
SERIES = len(drawing.COLOURS)  # that one figure can tell apart
TICKS = 9  # values of an axis that are all named
ROWS = 40  # of a figure whose rows are configurations
LOG = 20.0  # largest over smallest value of an axis, from which it is logarithmic


def comparisons(study: Study) -> Iterator[Picture]:
    """The figures of the metric that the runs allow."""
    for draw in (along, surface, tail):
        if (picture := draw(study)) is not None:
            yield picture


def numeric(study: Study, axis: str) -> bool:
    """Whether the values of an axis are numbers."""
    return all(_is_number(group.values[axis]) for group in study.groups)


def main_axis(study: Study) -> str | None:
    """The axis that figures have from left to right: alpha, or else the first one of numbers."""
    return next((axis for axis in study.axes if numeric(study, axis)), None)


def series(study: Study, axis: str) -> list[tuple[str, list[Group]]]:
    """The groups that differ on ``axis`` alone, with what they share; in the order of the axis."""
    others = [other for other in study.axes if other != axis]
    found: dict[str, list[Group]] = {}
    for group in study.groups:
        name = ", ".join(f"{study.label(other)} = {group.values[other]}" for other in others)
        found.setdefault(name, []).append(group)
    return [(name, sorted(members, key=lambda group: float(group.values[axis]))) for name, members in found.items()]


def along(study: Study) -> Picture | None:
    """The metric against the main axis, with intervals, the baseline's band, and the theory's edges."""
    axis = main_axis(study)
    if len(study.groups) < 2:
        return None
    if axis is None or len({group.values[axis] for group in study.groups}) < 2:
        return rows(study)
    lines = series(study, axis)
    figure, (panel,) = drawing.new()
    for number, (name, groups) in enumerate(lines[:SERIES]):
        x = [float(group.values[axis]) for group in groups]
        _bars(panel, x, [group.estimate for group in groups], study.metric, number, name or None)
    band = _band(study, panel) if len(lines) == 1 else ""
    edges = _edges(study, panel) if axis == "alpha" else ""
    if is_log(study, axis):
        panel.set_xscale("log")
    elif len(values := {float(group.values[axis]) for group in study.groups}) <= TICKS:
        panel.set_xticks(sorted(values))
    panel.set(xlabel=study.label(axis), ylabel=titled(study.metric))
    _keep_possible(panel, study.metric)
    if lines[0][0]:
        panel.legend(loc="best")
    more = f" {len(lines) - SERIES} more settings are in the table." if len(lines) > SERIES else ""
    return drawing.finish(
        figure, "metric", f"{study.metric} against {study.label(axis)}", f"{_bars_are(study)}{band}{edges}{more}"
    )


def rows(study: Study) -> Picture:
    """The metric of each configuration, where no axis has numbers."""
    groups = sorted(study.groups, key=lambda group: group.estimate.mean)[-ROWS:]
    figure, (panel,) = drawing.new(height=1.0 + 0.28 * len(groups))
    scale = factor(study.metric)
    for y, group in enumerate(groups):
        one = group.estimate
        low, high = one.interval or (one.mean, one.mean)
        panel.plot([scale * low, scale * high], [y, y], color=drawing.COLOURS[0], linewidth=1.6)
        panel.plot([scale * one.mean], [y], "s" if group.is_baseline else "o", color=drawing.COLOURS[0], markersize=5)
    panel.set_yticks(range(len(groups)), [study.name(group) for group in groups])
    panel.grid(axis="x", color=INK, alpha=0.13, linewidth=0.6)
    panel.set(xlabel=titled(study.metric))
    more = f" The {ROWS} highest of {len(study.groups)}." if len(study.groups) > ROWS else ""
    base = " The square is the baseline." if any(group.is_baseline for group in groups) else ""
    return drawing.finish(figure, "metric", f"{study.metric} by configuration", f"{_bars_are(study)}{base}{more}")


def surface(study: Study) -> Picture | None:
    """A map of the metric over alpha and another axis, the temperature if it varies."""
    others = [axis for axis in study.axes if axis != "alpha" and numeric(study, axis)]
    others.sort(key=lambda axis: axis != "loss.temperature")
    if "alpha" not in study.axes or not others or not numeric(study, "alpha"):
        return None
    other, cells = others[0], dict[tuple[float, float], list[Group]]()
    for group in study.groups:
        cells.setdefault((float(group.values["alpha"]), float(group.values[other])), []).append(group)
    xs, ys = (sorted({place[side] for place in cells}) for side in (0, 1))
    if len(xs) < 2 or len(ys) < 2 or len(study.axes) > 2:
        return None
    scale = factor(study.metric)
    means = [[scale * cells[x, y][0].estimate.mean if (x, y) in cells else math.nan for x in xs] for y in ys]
    figure, (panel,) = drawing.new(height=1.4 + 0.42 * min(len(ys), 12))
    panel.grid(False)
    colours = drawing.scale([value for row in means for value in row if math.isfinite(value)])
    panel.pcolormesh(range(len(xs) + 1), range(len(ys) + 1), means, cmap=colours.cmap, norm=colours.norm)
    if len(xs) <= 12:
        for j, row in enumerate(means):
            for i, value in enumerate(row):
                if math.isfinite(value):
                    white = colours.norm(value) < 0.6
                    panel.text(
                        i + 0.5, j + 0.5, f"{value:.4g}", ha="center", va="center", fontsize=7.5,
                        color="#ffffff" if white else "#000000",
                    )  # fmt: skip
    for name, metric in EDGES.items():
        found = [_position(_mean([g.mean(metric) for x in xs for g in cells.get((x, y), [])]), xs) for y in ys]
        points = [(x, j + 0.5) for j, x in enumerate(found) if x is not None]
        if len(points) > 1:
            panel.plot(*zip(*points, strict=True), color="#d55e00", linewidth=1.8, linestyle="--")
            panel.annotate(
                SIGNS[name], (points[-1][0], len(ys)), xytext=(0, 2), textcoords="offset points", color="#d55e00",
                ha="center", va="bottom",
            )  # fmt: skip
    panel.set_xticks([i + 0.5 for i in range(len(xs))], [f"{x:g}" for x in xs], rotation=90 if len(xs) > 12 else 0)
    panel.set_yticks([j + 0.5 for j in range(len(ys))], [f"{y:g}" for y in ys])
    panel.set(xlabel="alpha", ylabel=study.label(other))
    figure.colorbar(colours, ax=panel, label=titled(study.metric))
    caption = f"Means over {study.seeds} seeds. Dashed: the theory's edges, as means of what the runs measured."
    return drawing.finish(figure, "map", f"{study.metric} over alpha and {study.label(other)}", caption)


def tail(study: Study) -> Picture | None:
    """The accuracies of many, medium and few classes of a long tail."""
    names = [name for name in ("many", "medium", "few") if study.groups[0].mean(f"{study.metric}/{name}") is not None]
    axis = main_axis(study)
    if len(names) < 2 or axis is None or len(study.groups) < 2:
        return None
    _, groups = series(study, axis)[0]
    figure, (panel,) = drawing.new()
    for number, name in enumerate(names):
        found = [(float(g.values[axis]), one) for g in groups if (one := g.of(f"{study.metric}/{name}")) is not None]
        _bars(panel, [x for x, _ in found], [one for _, one in found], study.metric, number, name)
    shared = series(study, axis)[0][0]
    panel.set(xlabel=study.label(axis), ylabel=titled(study.metric), title=shared)
    _keep_possible(panel, study.metric)
    panel.legend(title="training images of a class")
    return drawing.finish(figure, "tail", f"{study.metric} of many, medium and few", _bars_are(study))


def _bars(panel: "Axes", x: Sequence[float], y: Sequence[Estimate], metric: str, number: int, name: str | None) -> None:
    scale = factor(metric)
    means = [scale * one.mean for one in y]
    ends = [one.interval or (one.mean, one.mean) for one in y]
    errors = [[mean - scale * low for mean, (low, _) in zip(means, ends, strict=True)]]
    errors.append([scale * high - mean for mean, (_, high) in zip(means, ends, strict=True)])
    panel.errorbar(
        x, means, yerr=errors, color=drawing.colour(number), marker=drawing.marker(number), markersize=4.5,
        linewidth=1.4, capsize=2.5, label=name,
    )  # fmt: skip


def _keep_possible(panel: "Axes", metric: str) -> None:
    """Cut what lies outside of 0 to 100 %, where intervals of two seeds reach."""
    if unit(metric) == "%":
        low, high = panel.get_ylim()
        panel.set_ylim(max(low, 0), min(high, 100))


def _band(study: Study, panel: "Axes") -> str:
    base = next((group for group in study.groups if group.is_baseline), None)
    if base is None or base.estimate.interval is None:
        return ""
    low, high = (factor(study.metric) * end for end in base.estimate.interval)
    panel.axhspan(low, high, color=drawing.COLOURS[0], alpha=0.12, linewidth=0)
    ends = interval(study.metric, base.estimate.interval)
    return f" The band is the interval of {study.name(base)}, {ends} {unit(study.metric)}".rstrip() + "."


def _edges(study: Study, panel: "Axes") -> str:
    """Draw the edges of the theory that lie near the sweep; a mean over all runs each."""
    values = [float(group.values["alpha"]) for group in study.groups]
    shown = []
    for name, metric in EDGES.items():
        measured = [value for group in study.groups if (value := group.mean(metric)) is not None]
        spread = max(measured) - min(measured) if measured else math.inf
        if (
            measured
            and spread < 0.1
            and min(values) - 0.15 <= (x := sum(measured) / len(measured)) <= max(values) + 0.15
        ):
            drawing.edge(panel, x, SIGNS[name])
            shown.append(name)
    meaning = {
        "alpha_mis": "below alpha_mis positives are separated",
        "alpha_c": "above alpha_c separated classes keep out features of single images",
        "alpha_col": "above alpha_col everything is forecast to collapse",
    }
    return f" Dashed, by the theory: {'; '.join(meaning[name] for name in shown)}." if shown else ""


def _bars_are(study: Study) -> str:
    return "One seed each." if study.single else f"Means over {study.seeds} seeds with 95 % intervals (Student's t)."


def is_log(study: Study, axis: str) -> bool:
    """Whether the values of an axis are best shown on a logarithmic scale."""
    values = [float(group.values[axis]) for group in study.groups]
    return min(values) > 0 and max(values) / min(values) >= LOG


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _position(x: float | None, ticks: Sequence[float]) -> float | None:
    """Where a number lies on an axis whose cells have equal widths; None outside."""
    if x is None or not ticks[0] <= x <= ticks[-1]:
        return None
    at = max(i for i, tick in enumerate(ticks[:-1]) if tick <= x)
    return at + 0.5 + (x - ticks[at]) / (ticks[at + 1] - ticks[at])

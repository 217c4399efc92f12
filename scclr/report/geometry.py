"""The figures about embeddings: bias, the parts of their length, alignment, spectra. None where numbers are missing."""

from collections.abc import Iterator
from contextlib import suppress

from scclr.config.errors import UserError
from scclr.report import drawing
from scclr.report.drawing import INK, PAPER, Picture
from scclr.report.figures import is_log, main_axis, series
from scclr.report.statistics import correlation
from scclr.report.study import Group, Study
from scclr.report.units import factor, titled
from scclr.run.files import is_number, read_json

PARTS = {"mean_norm2": r"$|\mu|^2$", "s_b": r"$S_B$", "b2": "B2", "v_aug": r"$V_{aug}$"}
B2 = "theory/z/b2"
ALIGNMENT, UNIFORMITY = "pretrain/alignment", "pretrain/uniformity"
MOST = 24  # spectra in a figure
LAYERS = {"h": "h, the representation", "z": "z, the embedding"}


def embeddings(study: Study) -> Iterator[Picture]:
    """The figures about embeddings that the runs allow."""
    for draw in (bias, decomposition, hypersphere, spectra):
        if (picture := draw(study)) is not None:
            yield picture


def bias(study: Study) -> Picture | None:
    """The bias B2 against the metric, with their correlation over configurations."""
    groups = [group for group in study.groups if group.mean(B2) is not None]
    if len(groups) < 3:
        return None
    x, y = [group.mean(B2) or 0.0 for group in groups], [group.estimate.mean for group in groups]
    axis, scale = main_axis(study), factor(study.metric)
    figure, (panel,) = drawing.new()
    runs = [(run, group) for group in groups for run in group.runs if B2 in run.numbers]
    values = [float(group.values[axis]) for group in groups] if axis else [0.0] * len(groups)
    colours = drawing.scale(values)
    by_group = {id(group): colours.to_rgba(value) for group, value in zip(groups, values, strict=True)}
    panel.scatter(
        [run.numbers[B2] for run, _ in runs], [scale * run.numbers[study.metric] for run, _ in runs],
        c=[by_group[id(group)] for _, group in runs], s=9, alpha=0.5, linewidths=0, rasterized=len(runs) > drawing.MANY,
    )  # fmt: skip
    panel.scatter(x, [scale * value for value in y], c=[by_group[id(group)] for group in groups], s=36, edgecolors=INK)
    panel.set(xlabel="B2 of z, squared bias of the prototypes", ylabel=titled(study.metric))
    if axis:
        figure.colorbar(colours, ax=panel, label=study.label(axis))
    found = correlation(x, y)
    said = "There are too few different configurations for a correlation."
    if found is not None:
        said = (
            f"Over n = {found.n} configurations Pearson's r is {found.r:.2f} {_two(found.interval)} and Spearman's rho "
            f"{found.rho:.2f} {_two(found.rho_interval)} (95 % intervals)."
        )
    caption = (
        f"Large points are means over seeds, small ones runs. {said} B2 falls to 0 also where everything collapses."
    )
    return drawing.finish(figure, "bias", f"Prototype bias against {study.metric}", caption)


def decomposition(study: Study) -> Picture | None:
    """The four parts of 1 = |mu|^2 + S_B + B2 + V_aug over the main axis."""
    axis = main_axis(study)
    names = [f"theory/z/{part}" for part in PARTS]
    if axis is None:
        return None
    known = [(name, [g for g in groups if g.mean(names[0]) is not None]) for name, groups in series(study, axis)]
    known = [(name, groups) for name, groups in known if len(groups) > 1][:3]
    if not known:
        return None
    figure, panels = drawing.new(1, len(known), width=3.0 + 2.6 * len(known) - (0.2 if len(known) == 1 else 0))
    for panel, (name, groups) in zip(panels, known, strict=True):
        x = [float(group.values[axis]) for group in groups]
        stacks = [[group.mean(part) or 0.0 for group in groups] for part in names]
        areas = panel.stackplot(
            x, stacks, colors=[drawing.colour(i) for i in (4, 1, 5, 2)], labels=list(PARTS.values())
        )
        for area, hatch in zip(areas, ("", "//", "xx", ".."), strict=True):
            area.set(hatch=hatch, edgecolor=PAPER, linewidth=0.4)
        panel.set(xlabel=study.label(axis), ylim=(0, 1), title=name, xlim=(x[0], x[-1]))
        if is_log(study, axis):
            panel.set_xscale("log")
    panels[0].set_ylabel("share of E|z|^2 = 1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    caption = (
        f"Means over {study.seeds} seeds: squared norm of the mean, variance between classes, bias B2, and variance "
        "between views of an image. They sum to 1."
    )
    return drawing.finish(figure, "decomposition", "What the embeddings' length of 1 is made of", caption)


def hypersphere(study: Study) -> Picture | None:
    """Alignment against uniformity at the end of the training."""
    groups = [g for g in study.groups if g.mean(ALIGNMENT) is not None and g.mean(UNIFORMITY) is not None]
    if len(groups) < 2:
        return None
    axis = main_axis(study)
    values = [float(group.values[axis]) for group in groups] if axis else [0.0] * len(groups)
    figure, (panel,) = drawing.new()
    colours = drawing.scale(values)
    x, y = ([group.mean(metric) or 0.0 for group in groups] for metric in (UNIFORMITY, ALIGNMENT))
    panel.scatter(x, y, c=[colours.to_rgba(value) for value in values], s=36, edgecolors=INK)
    panel.set(xlabel="uniformity (lower is more uniform)", ylabel="alignment (lower is closer)")
    if axis:
        figure.colorbar(colours, ax=panel, label=study.label(axis))
    caption = f"Of the embeddings z of a training batch at the last logged step; means over {study.seeds} seeds."
    return drawing.finish(figure, "alignment", "Alignment against uniformity", caption)


def spectra(study: Study) -> Picture | None:
    """The singular values of h and z, from the ``spectrum.json`` of the first run of each configuration."""
    axis = main_axis(study)
    groups = [(group, found) for group in study.groups if (found := _spectrum(group))]
    groups = groups if len(groups) <= MOST else [groups[len(groups) * i // MOST] for i in range(MOST)]
    layers = [layer for layer in LAYERS if any(found.get(layer) for _, found in groups)]
    if not layers:
        return None
    values = [float(group.values[axis]) if axis else float(i) for i, (group, _) in enumerate(groups)]
    colours = drawing.scale(values)
    figure, panels = drawing.new(1, len(layers), width=2.0 + 2.8 * len(layers))
    for panel, layer in zip(panels, layers, strict=True):
        for value, (_, found) in zip(values, groups, strict=True):
            spectrum = [one for one in found.get(layer, []) if one > 0]
            panel.plot(range(1, len(spectrum) + 1), spectrum, color=colours.to_rgba(value), linewidth=1.3)
        panel.set(title=LAYERS[layer], xlabel="number of the singular value", yscale="log")
    panels[0].set_ylabel("singular value / their sum")
    if axis and len(groups) > 1:
        figure.colorbar(colours, ax=panels, label=study.label(axis))
    named = "" if axis or len(groups) < 2 else " Lines are in the order of the table, dark to light."
    caption = f"Of the first seed of {len(groups)} configuration{'s' * (len(groups) > 1)}.{named}"
    return drawing.finish(figure, "spectrum", "Singular values of the features", caption)


def _spectrum(group: Group) -> dict[str, list[float]]:
    with suppress(OSError, UserError):
        found = read_json(group.runs[0].directory / "spectrum.json")
        return {
            layer: found[layer]
            for layer in LAYERS
            if isinstance(found.get(layer), list) and all(map(is_number, found[layer]))
        }
    return {}


def _two(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"

"""The figures over the steps of the training, from the rows of ``metrics.jsonl``."""

from collections.abc import Iterator, Sequence

from scclr.report import drawing
from scclr.report.drawing import INK, PAPER, Picture
from scclr.report.study import Group, Study

MOST = 6  # configurations in a figure
FORCES = {
    "pretrain/attract": "attraction A",
    "pretrain/repel": "repulsion R",
    "pretrain/gradient/attract": "gradient norm of A",
    "pretrain/gradient/repel": "gradient norm of R",
}
LEARNING = {
    "pretrain/knn": "kNN accuracy on validation images",
    "pretrain/online/top1": "online probe on training views",
    "pretrain/loss": "loss",
}
GAPS = {  # of the bound's slack, and what each step replaces
    "pretrain/bound/margin_gap": "maximum over all classes",
    "pretrain/bound/logsumexp_gap": "maximum to log-sum-exp",
    "pretrain/bound/prior_gap": "unequal class shares",
    "pretrain/bound/jensen_gap": "mean inside exp (Jensen)",
}
SLACK, EXCLUDED = "pretrain/bound/slack", "pretrain/bound/class_excluded_slack"
Curve = tuple[list[int], list[float], list[float], list[float]]  # steps; mean, lowest and highest over seeds


def trainings(study: Study) -> Iterator[Picture]:
    """The figures over training steps that the runs allow."""
    groups = chosen(study)
    for name, title, metrics in (
        ("forces", "Attraction, repulsion and their gradients", FORCES),
        ("learning", "Learning curves", LEARNING),
    ):
        if (picture := _draw(study, groups, name, title, metrics)) is not None:
            yield picture
    if (picture := slack(study, groups)) is not None:
        yield picture


def slack(study: Study, groups: Sequence[Group]) -> Picture | None:
    """The slack of the bound on the supervised objective, as the sum of what its four steps lose."""
    known = [(group, [curve(group, gap) for gap in (*GAPS, SLACK, EXCLUDED)]) for group in groups]
    panels_of = [(group, curves) for group, curves in known if all(curves)]
    if not panels_of:
        return None
    columns = min(3, len(panels_of))
    lines = -(-len(panels_of) // columns)
    width, height = 5.4 if columns == 1 else 2.4 * columns + 1, 1.2 + 2.3 * lines
    figure, panels = drawing.new(lines, columns, width, height)
    for panel, (group, curves) in zip(panels, panels_of, strict=False):
        *gaps, whole, excluded = [one for one in curves if one is not None]
        steps = whole[0]
        lam = [total / sum(parts) for total, *parts in zip(whole[1], *(gap[1] for gap in gaps), strict=True)]
        heights = [[a * b for a, b in zip(lam, gap[1], strict=True)] for gap in gaps]
        areas = panel.stackplot(steps, heights, colors=[drawing.colour(i) for i in (1, 4, 2, 5)], labels=GAPS.values())
        for area, hatch in zip(areas, ("//", "", "..", "xx"), strict=True):
            area.set(hatch=hatch, edgecolor=PAPER, linewidth=0.4)
        panel.plot(steps, excluded[1], color=INK, linewidth=1.3, linestyle="--", label="bound without own class")
        panel.set(xlabel="step", title=study.own(group) if len(panels_of) > 1 else "", xlim=(steps[0], steps[-1]))
    for panel in panels[len(panels_of) :]:
        panel.remove()
    top = max(panel.get_ylim()[1] for panel in panels[: len(panels_of)])
    for panel in panels[: len(panels_of)]:
        panel.set_ylim(0, top)
    panels[0].set_ylabel("slack")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    caption = (
        f"Means over {study.seeds} seeds. Contrastive loss + B2 + a constant is above the supervised objective by the "
        "slack, the sum of what each of four steps loses. The dashed line is the slack of the bound whose negatives "
        f"are of other classes.{_part(study, [group for group, _ in panels_of])}"
    )
    return drawing.finish(figure, "slack", "The slack of the bound over the training", caption)


def chosen(study: Study) -> list[Group]:
    """The configurations whose curves are shown: the first setting's, with its baseline, evenly along the main axis."""
    groups = list(study.settings[0][1])
    if len(groups) <= MOST:
        return groups
    base = [group for group in groups if group.is_baseline]
    rest = [group for group in groups if not group.is_baseline]
    count = MOST - len(base)
    even = [rest[round(i * (len(rest) - 1) / (count - 1))] for i in range(count)]
    return [group for group in groups if any(group is one for one in [*base, *even])]


def curve(group: Group, metric: str) -> Curve | None:
    """A metric of the log over steps: mean and range over the seeds that have a value at the step."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for row in run.rows:
            if metric in row:
                values.setdefault(row["step"], []).append(float(row[metric]))
    kept = sorted(step for step, found in values.items() if len(found) == max(map(len, values.values())))
    if len(kept) < 2:
        return None
    columns = [values[step] for step in kept]
    return kept, [sum(x) / len(x) for x in columns], [min(x) for x in columns], [max(x) for x in columns]


def _draw(study: Study, groups: Sequence[Group], name: str, title: str, metrics: dict[str, str]) -> Picture | None:
    known = {metric: [curve(group, metric) for group in groups] for metric in metrics}
    known = {metric: curves for metric, curves in known.items() if any(curves)}
    if not known:
        return None
    columns = min(2, len(known))
    lines = -(-len(known) // columns)
    figure, panels = drawing.new(lines, columns, width=5.4 if columns == 1 else 6.4, height=0.9 + 2.3 * lines)
    for panel, (metric, curves) in zip(panels, known.items(), strict=False):
        for number, (group, found) in enumerate(zip(groups, curves, strict=True)):
            if found is not None:
                steps, mean, low, high = found
                panel.plot(steps, mean, color=drawing.colour(number), linewidth=1.3, label=study.own(group))
                panel.fill_between(steps, low, high, color=drawing.colour(number), alpha=0.18, linewidth=0)
        panel.set(title=metrics[metric], xlabel="step")
    for panel in panels[len(known) :]:
        panel.remove()
    if len(groups) > 1:
        handles = max(
            (panel.get_legend_handles_labels() for panel in panels[: len(known)]), key=lambda one: len(one[0])
        )
        figure.legend(*handles, loc="outside upper center", ncols=2)
    spread = (
        "Lines are single runs."
        if study.single
        else "Means over seeds; the bands reach from the lowest to the highest seed."
    )
    return drawing.finish(figure, name, title, f"{spread}{_part(study, groups)}")


def _part(study: Study, groups: Sequence[Group]) -> str:
    """A sentence that says which of the configurations are shown; empty if all are."""
    if len(groups) == len(study.groups):
        return ""
    return f" {len(groups)} of {len(study.groups)} configurations {study.setting(study.settings[0][0])}".rstrip() + "."

"""What the runs of a report say: their configurations with means over seeds, and the differences from a baseline."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from scclr.config.errors import did_you_mean, require
from scclr.report.runs import Run, axes, label, shown, value_of
from scclr.report.statistics import SIGNIFICANT, Difference, Estimate, difference, estimate, holm
from scclr.report.units import direction
from scclr.report.words import Words, words_of

PLAIN_ALPHA = "0.5"  # the loss of the paper, which other balances are compared with
DATA = ("dataset", "probe.dataset")  # accuracies on different data are never compared


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ in the seed alone.

    Args:
        values: on the axes of the study, as one types them.
        difference: from the baseline's group; None for the baseline itself and where there is none.
        p: of the difference, two-sided, corrected for the number of differences in the study.
        best: whether the interval of its difference from every other group of its setting is on the better side of 0.
    """

    runs: tuple[Run, ...]
    values: Mapping[str, str]
    metric: str
    difference: Difference | None = None
    p: float | None = None
    best: bool = False
    is_baseline: bool = False

    @cached_property
    def scores(self) -> dict[int, float]:
        """The metric by seed."""
        return {run.seed: run.numbers[self.metric] for run in self.runs}

    @cached_property
    def estimate(self) -> Estimate:
        """Mean and interval of the metric."""
        return self.of(self.metric) or estimate([0.0])

    def of(self, metric: str) -> Estimate | None:
        """Mean and interval of another metric; None if no run has it."""
        values = [run.numbers[metric] for run in self.runs if metric in run.numbers]
        return estimate(values) if values else None

    def mean(self, metric: str) -> float | None:
        """The mean of another metric; None if no run has it."""
        values = [run.numbers[metric] for run in self.runs if metric in run.numbers]
        return sum(values) / len(values) if values else None

    @cached_property
    def words(self) -> Words | None:
        """What to type for these runs, without the seed; None if this version cannot compose them."""
        found = words_of(self.runs[0].result["config"])
        return None if found is None else {key: value for key, value in found.items() if key != "seed"}

    @property
    def mark(self) -> str:
        """``above`` or ``below`` the baseline if the corrected p-value says so, else empty."""
        if self.difference is None or self.p is None or self.p >= SIGNIFICANT:
            return ""
        return "above" if self.difference.value > 0 else "below"


@dataclass(frozen=True)
class Study:
    """Groups of runs that are compared by a metric.

    Args:
        axes: the keys that vary, by which groups are told apart.
        baseline: values on some axes; a group is compared with the one that has these, and the same on the other axes.
        lacking: run folders without the metric.
    """

    metric: str
    axes: tuple[str, ...]
    groups: tuple[Group, ...]
    baseline: Mapping[str, str]
    lacking: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs that are compared."""
        return [run for group in self.groups for run in group.runs]

    @property
    def single(self) -> bool:
        """Whether no group has more than one seed."""
        return all(len(group.runs) == 1 for group in self.groups)

    @property
    def seeds(self) -> str:
        """How many seeds the configurations have, such as ``3`` or ``2 to 5``."""
        counts = sorted({len(group.runs) for group in self.groups})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    @cached_property
    def settings(self) -> list[tuple[dict[str, str], list[Group]]]:
        """The groups that are compared with each other, with what they share: the axes that the baseline leaves free.

        Without a baseline all groups on the same data are compared.
        """
        free = [axis for axis in self.axes if axis.startswith(DATA)]
        if self.baseline:
            others = [axis for axis in self.axes if axis not in self.baseline]
            free = [axis for axis in others if not tied(axis, self.groups, self.baseline)]
        found: dict[tuple[str, ...], list[Group]] = {}
        for group in self.groups:
            found.setdefault(tuple(group.values[axis] for axis in free), []).append(group)
        return [(dict(zip(free, key, strict=True)), groups) for key, groups in found.items()]

    def label(self, axis: str) -> str:
        """The short name of an axis."""
        return label(axis, self.axes)

    def name(self, group: Group) -> str:
        """A group by its values, such as ``alpha = 0.3, temperature = 0.5``."""
        return ", ".join(f"{self.label(axis)} = {group.values[axis]}" for axis in self.axes) or "these runs"

    def own(self, group: Group) -> str:
        """A group by what tells it from the others of its setting, such as ``alpha = 0.3``."""
        shared = next(shared for shared, groups in self.settings if any(one is group for one in groups))
        own = [axis for axis in self.axes if axis not in shared]
        return ", ".join(f"{self.label(axis)} = {group.values[axis]}" for axis in own) or self.name(group)

    def setting(self, shared: Mapping[str, str]) -> str:
        """What the groups of a setting share, such as ``at temperature 0.5``; empty if all are in one setting."""
        words = [f"{self.label(axis)} {value}" for axis, value in shared.items()]
        return f"at {' and '.join(words)}" if words else ""


def tied(axis: str, groups: Sequence[Group], baseline: Mapping[str, str]) -> bool:
    """Whether an axis follows from those of the baseline, as the temperature does if each loss has its own."""
    seen: dict[tuple[str, ...], set[str]] = {}
    for group in groups:
        seen.setdefault(tuple(group.values[key] for key in baseline), set()).add(group.values[axis])
    return all(len(values) == 1 for values in seen.values())


def study(runs: Sequence[Run], metric: str | None, baseline: Mapping[str, str] | None) -> Study:
    """Group runs, and compare the groups by a metric.

    Args:
        metric: None takes the accuracy that most runs have.
        baseline: by axes, or the short names of these; None takes ``alpha=0.5`` or, for two folders, the first one.

    Raises:
        UserError: no run has the metric, or none has the values of the baseline.
    """
    chosen = _metric(runs, metric)
    having = [run for run in runs if chosen in run.numbers]
    lacking = tuple(str(run.directory) for run in runs if chosen not in run.numbers)
    varying = axes(having)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in having:
        place = run.folder if "folder" in varying else ""
        members.setdefault((place, run.group), []).append(run)
    groups = []
    for found in members.values():
        values = {axis: shown(value_of(found[0], axis)) for axis in varying}
        groups.append(Group(tuple(sorted(found, key=lambda run: run.seed)), values, chosen))
    groups.sort(key=lambda group: [_order(group.values[axis]) for axis in varying])
    start = _baseline(varying, groups, baseline, runs[0].folder)
    made = Study(chosen, tuple(varying), tuple(groups), start, lacking)
    compared = [group for _, members in made.settings for group in _compared(members, start)]
    p = [group.difference.p for group in compared if group.difference is not None and group.difference.p is not None]
    corrected = iter(holm(p))
    known = [
        replace(group, p=next(corrected)) if group.difference and group.difference.p is not None else group
        for group in compared
    ]
    by_run = {id(group.runs): group for group in known}
    return replace(made, groups=tuple(by_run[id(group.runs)] for group in groups))


def _order(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _metric(runs: Sequence[Run], metric: str | None) -> str:
    counts = Counter(name for run in runs for name in run.numbers)
    if metric is not None:
        advice = did_you_mean(metric, counts) or f"; some are {', '.join(list(counts)[:6])}"
        require(metric in counts, f"--metric {metric}: no finished run has it{advice}")
        return metric
    parts = ("validation/", "pretrain/", "seconds/", "z/")
    own = [name for name in counts if not name.startswith(parts) and "baseline/" not in name]
    tiers = (
        [name for name in own if name.endswith("/top1")],
        [name for name in own if direction(name) > 0],
        [name for name in counts if name == "pretrain/knn"],
        [name for name in own if not name.startswith("forecast/")],
        list(counts),
    )
    tier = next(names for names in tiers if names)
    return max(tier, key=lambda name: counts[name])  # the first of those that most runs have


def _baseline(
    varying: Sequence[str], groups: Sequence[Group], given: Mapping[str, str] | None, first: str
) -> dict[str, str]:
    if given is None:
        if "folder" in varying:
            return {"folder": first}
        return {"alpha": PLAIN_ALPHA} if any(group.values.get("alpha") == PLAIN_ALPHA for group in groups) else {}
    names = {label(axis, varying): axis for axis in varying} | {axis: axis for axis in varying}
    found = {}
    for name, value in given.items():
        known = ", ".join(label(axis, varying) for axis in varying) or "nothing"
        hint = did_you_mean(name, names) or f"; what varies is {known}"
        require(name in names, f"--baseline {name}={value}: {name} does not vary{hint}")
        axis = names[name]
        values = list(dict.fromkeys(group.values[axis] for group in groups))
        same = [known for known in values if _order(known) == _order(value)]
        require(len(same) > 0, f"--baseline {name}={value}: no run has it; choose one of {', '.join(values)}")
        found[axis] = same[0]
    return found


def _compared(groups: Sequence[Group], baseline: Mapping[str, str]) -> list[Group]:
    """The groups of one setting with their differences from its baseline, and the best one marked."""
    bases = [group for group in groups if all(group.values[axis] == value for axis, value in baseline.items())]
    base = bases[0] if baseline and len(bases) == 1 else None  # of several nothing says which
    best = _best(groups)
    return [
        replace(
            group,
            difference=None if base is None or group is base else difference(group.scores, base.scores),
            is_baseline=group is base,
            best=group is best,
        )
        for group in groups
    ]


def _best(groups: Sequence[Group]) -> Group | None:
    """The group that is better than each other one of its setting by an interval without 0.

    A false one appears in about 5 % of studies at most, however many groups there are: it has to beat the truly best
    group, which happens by chance in 2.5 % for each of them, and all others besides.
    """
    sign = direction(groups[0].metric)
    if sign == 0 or len(groups) < 2:
        return None
    best = max(groups, key=lambda group: sign * (group.mean(group.metric) or 0.0))
    for other in groups:
        if other is not best:
            found = difference(best.scores, other.scores).interval
            if found is None or min(sign * end for end in found) <= 0:
                return None
    return best

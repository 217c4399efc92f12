"""The sentences that a report opens with, made from its statistics alone."""

from collections.abc import Sequence

from scclr.report.study import Group, Study
from scclr.report.units import direction, interval, signed, titled, unit, with_unit

MOST = 8  # settings with sentences of their own
MINUS = "\N{MINUS SIGN}"


def answer(study: Study) -> list[str]:
    """One sentence or more: what differs from the baseline by how much, and where no difference is shown."""
    groups = study.groups
    if len(groups) == 1:
        return [_alone(study, groups[0])]
    if study.single:
        return [_unreplicated(study)]
    found = [(shared, *_compared(study, shared, members)) for shared, members in study.settings]
    lines = [line for _, line, _ in found if line]
    silent = [shared for shared, _, quiet in found if quiet]
    if len(lines) > MOST:
        lines[MOST:] = [f"The table shows a difference at {len(lines) - MOST} more settings."]
    if silent:
        where = f"{_space(_places(study, silent))} ({study.seeds} seeds)"
        if study.baseline:
            lines.append(f"No difference {_against(study)} is shown{where}.")
        else:
            lines.append(f"No row is shown to be the best{where}; --baseline <key>=<value> compares with one.")
    if not lines:
        lines = [f"Nothing is compared with {_base(study)}, because no two rows differ in that alone."]
    return lines


def _alone(study: Study, group: Group) -> str:
    one, name = group.estimate, f"{study.metric} is {with_unit(study.metric, group.estimate.mean)}"
    if one.interval is None:
        which = "one seed" if one.n == 1 else f"{one.n} seeds, all the same"
        return f"{name} of {which}, so there is no interval: add seed={','.join(map(str, range(one.n + 2)))}."
    return f"{name}, 95 % interval {interval(study.metric, one.interval)} over {one.n} seeds."


def _unreplicated(study: Study) -> str:
    sign = direction(study.metric) or 1
    best = max(study.groups, key=lambda group: sign * group.estimate.mean)
    word = "best" if direction(study.metric) else "largest"
    which = f"The {word} {study.metric} is that of {study.name(best)}, {with_unit(study.metric, best.estimate.mean)}"
    if best.difference is not None:
        which += f" ({signed(study.metric, best.difference.value)} {_points(study)} {_against(study)})"
    return (
        f"One seed each: nothing tells a difference from chance, and there are no intervals. {which}. Add seed=0,1,2."
    )


def _compared(study: Study, shared: dict[str, str], groups: Sequence[Group]) -> tuple[str, bool]:
    """(what a setting says about the baseline, whether it shows no difference); empty where nothing is compared."""
    compared = [group for group in groups if group.difference is not None]
    if not compared:
        best = next((group for group in groups if group.best), None)
        if best is None or study.baseline:
            return "", len(groups) > 1 and not study.baseline
        where = study.setting(shared)
        return f"{_capital(study.own(best))} has the best {study.metric}{_space(where)}: {_value(study, best)}.", False
    better = [group for group in compared if group.mark and _gain(study, group) > 0]
    worse = [group for group in compared if group.mark and _gain(study, group) < 0]
    if not better and not worse:
        return "", True
    where, parts = _space(study.setting(shared)), []
    if better:
        top = max(better, key=lambda group: _gain(study, group))
        also = [study.own(group) for group in better if group is not top]
        parts.append(_sentence(study, top, where) + (f"; above it too: {_listed(also)}" if also else ""))
    if worse:
        low = min(worse, key=lambda group: _gain(study, group))
        also = [study.own(group) for group in worse if group is not low]
        first = _sentence(study, low, "" if better else where)
        parts.append(first + (f"; on the same side: {_listed(also)}" if also else ""))
    return "; ".join(parts) + ".", False


def _sentence(study: Study, group: Group, where: str) -> str:
    found, metric = group.difference, study.metric
    assert found is not None
    side = "above" if found.value > 0 else "below"
    ends = found.interval if found.value > 0 or found.interval is None else (-found.interval[1], -found.interval[0])
    size = signed(metric, abs(found.value)).lstrip("+")
    pairing = f"{found.n} seeds, paired" if found.paired else f"{found.n} seeds or more each, unpaired"
    return (
        f"{study.own(group)} is {size} {_points(study)} {interval(metric, ends).replace('-', MINUS)} {side} "
        f"{_base(study)}{where} ({pairing})"
    )


def _gain(study: Study, group: Group) -> float:
    assert group.difference is not None
    return (direction(study.metric) or 1) * group.difference.value


def _base(study: Study) -> str:
    """The baseline's values, with the names of their axes where a number alone would be read as one of the metric."""
    short = len(study.baseline) == 1
    return ", ".join(value if short else f"{study.label(axis)} = {value}" for axis, value in study.baseline.items())


def _against(study: Study) -> str:
    return "from " + ", ".join(f"{study.label(axis)} = {value}" for axis, value in study.baseline.items())


def _places(study: Study, settings: Sequence[dict[str, str]]) -> str:
    """Several settings, such as ``at temperature 0.2 and 1``."""
    if len(settings[0]) != 1:
        return _listed([study.setting(shared) for shared in settings])
    (axis,) = settings[0]
    return f"at {study.label(axis)} {_listed([shared[axis] for shared in settings])}"


def _value(study: Study, group: Group) -> str:
    return f"{with_unit(study.metric, group.estimate.mean)} {interval(study.metric, group.estimate.interval)}"


def _points(study: Study) -> str:
    return "points" if unit(study.metric) == "%" else unit(study.metric) or f"({titled(study.metric)})"


def _listed(words: Sequence[str]) -> str:
    if len(words) > MOST:
        words = [*words[:MOST], f"{len(words) - MOST} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _space(text: str) -> str:
    return f" {text}" if text else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

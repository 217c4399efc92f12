"""How numbers are written: accuracies in percent and their differences in points, others as they are."""

import math
import re

SHARE = re.compile(r"(^|/)(top\d+|balanced|ece|knn|many|medium|few)(_\w+)?$|^validation/")  # fractions in [0, 1]
BETTER = re.compile(r"(^|/)(top\d+|balanced|knn|many|medium|few|nmi|ari)$|^validation/")  # the larger, the better
WORSE = re.compile(r"(^|/)(ece|loss)$|^seconds/")  # the larger, the worse


def factor(metric: str) -> float:
    """What a number of a metric is multiplied by to be shown."""
    return 100.0 if SHARE.search(metric) else 1.0


def unit(metric: str) -> str:
    """The unit of a metric, for axes and headings; empty if it has none."""
    return "%" if SHARE.search(metric) else "s" if metric.startswith("seconds/") else ""


def titled(metric: str) -> str:
    """A metric with its unit, as a heading."""
    return f"{metric}, {unit(metric)}" if unit(metric) else metric


def direction(metric: str) -> int:
    """1 if a larger number is better, -1 if it is worse, 0 if neither is known."""
    return 1 if BETTER.search(metric) else -1 if WORSE.search(metric) else 0


def number(metric: str, value: float | None) -> str:
    """A number of a metric, without its unit."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}" if SHARE.search(metric) else f"{value:.4g}"


def with_unit(metric: str, value: float) -> str:
    """A number of a metric, with its unit."""
    return f"{number(metric, value)} {unit(metric)}".rstrip()


def interval(metric: str, ends: tuple[float, float] | None, *, sign: bool = False) -> str:
    """An interval as ``[low, high]``; a dash without one."""
    if ends is None:
        return "-"
    return f"[{', '.join(signed(metric, end) if sign else number(metric, end) for end in ends)}]"


def signed(metric: str, value: float | None) -> str:
    """A difference with its sign, in points if the metric is a share."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{100 * value:+.2f}" if SHARE.search(metric) else f"{value:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def probability(p: float | None) -> str:
    """A p-value."""
    if p is None or math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"

"""Experiments of which no theory here predicts a direction."""

from collections.abc import Mapping

from judges.verdict import PROBE, Judge, Runs, Verdict, differs, told
from scclr.report.study import study
from scclr.report.units import probability

POINT = 0.01
QUESTIONS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {  # by experiment: question, axes, baseline
    "oracle": ("What do losses that read labels add?", ("loss", "loss."), {"loss": "balanced"}),
    "similarity": (
        "What do unit rows do?",
        ("projector.normalize", "loss.similarity", "loss.temperature", "alpha"),
        {"projector.normalize": "true"},
    ),
    "equal_rate": (
        "Is an effect of alpha one of the size of the gradient?",
        ("loss.rescale", "alpha"),
        {"loss.rescale": "none"},
    ),
    "schedules": (
        "Does it matter when alpha has its value?",
        ("alpha", "alpha_end", "alpha_schedule"),
        {"alpha": "0.5", "alpha_end": "0.5"},
    ),
    "loss_family": (
        "Does another loss at the same balance do the same?",
        ("loss", "loss.", "alpha"),
        {"loss": "balanced"},
    ),
}


def exploratory(name: str) -> Judge:
    """The judge of one of ``QUESTIONS``."""
    question, axes, baseline = QUESTIONS[name]

    def rule(runs: Runs) -> list[Verdict]:
        return compare(runs, baseline)

    typed = " ".join(f"{key}={value}" for key, value in baseline.items())
    rule.__doc__ = f"""scclr train -m experiment={name}; its axes are {", ".join(axes)} and seed.

    {question} Exploratory: no theory here predicts a direction. Each configuration is compared with {typed} at the same
    values of the other axes, by {PROBE} in pairs of seeds. Criterion: that it differs, either way, holds if Holm's p
    over all comparisons is below 0.05; it fails if the interval of the difference is within one point.
    """
    return Judge(rule, axes=axes, needs=(PROBE,))


def compare(runs: Runs, baseline: Mapping[str, str]) -> list[Verdict]:
    """A verdict for each configuration but the baselines.

    Raises:
        UserError: no run has the values of the baseline.
    """
    found, verdicts = study(runs, PROBE, baseline), []
    for shared, groups in found.settings:
        for base in [group for group in groups if group.is_baseline]:
            for group in [group for group in groups if group is not base]:
                values = [group.scores[seed] - base.scores[seed] for seed in group.scores if seed in base.scores]
                claim = f"exploratory: {found.own(group)} differs from {found.own(base)} {found.setting(shared)}"
                text = f"{told(values, 100)}, in points; p {probability(group.p)}"
                verdicts.append(Verdict(claim.rstrip(), differs(values, group.p, POINT), text))
    return verdicts

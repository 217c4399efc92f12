"""Whether the alpha at which everything collapses is forecast before training."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from judges.verdict import (
    ALPHA,
    FAILS,
    HOLDS,
    LEAST_SEEDS,
    NORM,
    TEMPERATURE,
    UNDECIDED,
    V_AUG,
    Judge,
    Runs,
    Verdict,
    by_augmentation,
    mean,
    seeds,
    split,
)
from scclr.components import make_augment, make_dataset, make_model
from scclr.config.resolve import restore
from scclr.report.runs import Run
from scclr.theory import augmentation_correlations, collapse_threshold
from scclr.theory.embed import embed
from scclr.theory.forecast import FORECAST_IMAGES, FORECAST_VIEWS
from scclr.theory.moments import COLLAPSED

PREDICTED, H_ALONE = "forecast/alpha_col", "forecast/alpha_col_h_alone"
TOLERANCE, LARGEST_SHIFT = 0.05, 0.03


class Setting(NamedTuple):
    """An augmentation and a temperature, with means over seeds. ``outside``: seeds with no threshold in the alphas."""

    augment: str
    temperature: float
    observed: float
    predicted: float
    h_alone: float
    seeds: int
    outside: int


def collapse(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=collapse_strong, then the same with collapse, and with collapse_weak: three strengths
    of augmentation, temperatures 0.2 and 0.5, alphas around the forecast, all below runs/collapse.

    E2. Prediction: alpha_col = 1 / (2 - r_max), where r_max is the largest correlation between views of what is linear
    in the pixels and in the untrained features. It is the forecast of each run. It is the same at every temperature,
    and lower for stronger augmentation. The forecast from the untrained h alone is shown beside it.

    Observation: half-way between the largest alpha up to which |mu|^2 <= 0.9 and the next one, by seed.

    Criterion: means over seeds differ by at most 0.05 in all settings but one in six; temperature moves no threshold by
    more than 0.03; and settings are in the order of their forecasts where these differ by more than 0.05. A setting
    where a seed has its threshold outside the alphas decides nothing.

    The forecast was chosen on other runs than it is judged by: scclr train -m experiment=collapse name=collapse_check
    seed=3,4,5 with augment.jitter=0 alpha=0.77,0.81,0.85,0.89,0.93, or with augment.crop_scale=[0.2,1.0]
    augment.rotation=30 augment.brightness=0.4 augment.contrast=0.4 alpha=0.56,0.60,0.64,0.68,0.72. They are judged by
    scripts/judge.py runs/collapse_check collapse.
    """
    found = settings(runs)
    inside = [one for one in found if not one.outside and one.seeds >= LEAST_SEEDS]
    text = "; ".join(
        f"{one.augment}, temperature {one.temperature:g}: observed {one.observed:.3f}, forecast {one.predicted:.3f}"
        + (f" ({one.outside} of {one.seeds} seeds outside)" if one.outside else "")
        for one in found
    )
    verdicts = []
    for name, claim in (("predicted", "the forecast"), ("h_alone", "the forecast from h alone")):
        near = sum(abs(one.observed - getattr(one, name)) <= TOLERANCE for one in inside)
        outcome = HOLDS if 6 * near >= 5 * len(inside) else FAILS
        numbers = f"{near} of {len(inside)} settings within {TOLERANCE}" + (f"; {text}" if name == "predicted" else "")
        verdicts.append(Verdict(f"E2: {claim} is where embeddings collapse", outcome if inside else UNDECIDED, numbers))
    shifts = {}
    for augment in {one.augment for one in inside}:
        values = [one.observed for one in inside if one.augment == augment]
        if len(values) > 1:
            shifts[augment] = max(values) - min(values)
    largest = max(shifts.values(), default=0.0)
    outcome = UNDECIDED if not shifts else HOLDS if largest <= LARGEST_SHIFT else FAILS
    numbers = f"largest shift {largest:.3f} of {len(shifts)} augmentations"
    verdicts.append(Verdict("E2: temperature does not move the threshold", outcome, numbers))
    apart = [(a, b) for a in inside for b in inside if b.predicted - a.predicted > TOLERANCE]
    wrong = sum(a.observed >= b.observed for a, b in apart)
    outcome = UNDECIDED if not apart else FAILS if wrong else HOLDS
    numbers = f"{wrong} of {len(apart)} pairs of settings in the wrong order"
    return [*verdicts, Verdict("E2: stronger augmentation collapses at a smaller alpha", outcome, numbers)]


def settings(runs: Runs) -> list[Setting]:
    """A row for each augmentation and temperature."""
    found = []
    for augment, members in by_augmentation(runs).items():
        for temperature, part in split(members, TEMPERATURE).items():
            by_seed = [[run for run in part if run.seed == seed] for seed in sorted({run.seed for run in part})]
            places = [threshold([(run.numbers[ALPHA], run.numbers[NORM]) for run in own]) for own in by_seed]
            inside = [place for place in places if place is not None]
            predicted, h_alone = (mean(own[0].numbers[name] for own in by_seed) for name in (PREDICTED, H_ALONE))
            observed = mean(inside) if inside else float("nan")
            outside = len(places) - len(inside)
            found.append(Setting(augment, temperature, observed, predicted, h_alone, seeds(part), outside))
    return found


def threshold(points: list[tuple[float, float]]) -> float | None:
    """Where one seed's (alpha, |mu|^2) collapse, or None if that is outside the alphas that were run."""
    points = sorted(points)
    for (below, size), (above, next_size) in pairwise(points):
        if next_size > COLLAPSED:
            return None if size > COLLAPSED else (below + above) / 2
    return None


def measure(runs: Runs) -> list[Run]:
    """The runs with the forecast from h alone, of which runs that differ in loss and alpha share one."""
    known: dict[str, float] = {}
    found = []
    for run in runs:
        config = restore(run.result["config"], str(run.directory))
        parts = [config.augment, config.encoder, config.projector.out_dim, config.dataset, config.seed]
        key = json.dumps(parts, sort_keys=True, default=str)
        if key not in known:
            torch.manual_seed(config.seed)
            splits = make_dataset(config).load()
            model = make_model(config, splits.mean, splits.std, image_size=splits.train.images.shape[-1])
            batch = config.pretrain.batch_size
            few = splits.pretrain[slice(0, max(1, FORECAST_IMAGES // batch) * batch)]
            h, _ = embed(model.train(), few, make_augment(config), FORECAST_VIEWS, batch, seed=config.seed)
            known[key] = collapse_threshold(augmentation_correlations(h)[0].item())
        found.append(replace(run, numbers={**run.numbers, H_ALONE: known[key]}))
    return found


def draw(runs: Runs) -> Figure:
    """|mu|^2 against alpha, a panel for each augmentation, with both forecasts."""
    parts, rows = list(by_augmentation(runs).items()), settings(runs)
    figure = Figure(figsize=(4 * len(parts), 3.4), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)
    for axis, (augment, members) in zip(panels[0], parts, strict=True):
        for number, (temperature, part) in enumerate(split(members, TEMPERATURE).items()):
            for seed in sorted({run.seed for run in part}):
                points = sorted((run.numbers[ALPHA], run.numbers[NORM]) for run in part if run.seed == seed)
                label = f"temperature {temperature:g}" if seed == part[0].seed else None
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=f"C{number}", lw=0.8, label=label)
        one = next(row for row in rows if row.augment == augment)
        axis.axvline(one.predicted, color="black", label="forecast")
        axis.axvline(one.h_alone, color="black", ls=":", label="forecast from h alone")
        axis.axhline(COLLAPSED, color="grey", lw=0.5)
        axis.set(xlabel="alpha", ylim=(-0.03, 1.03))
        axis.set_title(augment, fontsize=7)
    panels[0][0].set_ylabel("|mu|^2 of the trained embeddings")
    panels[0][0].legend(frameon=False, fontsize=7)
    return figure


JUDGE = Judge(
    collapse,
    axes=(ALPHA, TEMPERATURE, "augment."),
    needs=(ALPHA, TEMPERATURE, NORM, V_AUG, PREDICTED),
    also=(H_ALONE,),
    measure=measure,
    draw=draw,
)

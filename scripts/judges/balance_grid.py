"""What alpha trades at each temperature, whether the bias tells the accuracy, and SupCon against SimCLR."""

from dataclasses import replace
from itertools import pairwise
from math import sqrt

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from judges.supcon import DIFFERENCE, with_differences
from judges.verdict import (
    ALPHA,
    B2,
    FAILS,
    HOLDS,
    I_B,
    LEAST_SEEDS,
    NCC,
    NORM,
    PROBE,
    TEMPERATURE,
    UNDECIDED,
    V_AUG,
    Judge,
    Runs,
    Verdict,
    above,
    both,
    by_seed,
    differs,
    mean,
    ordered,
    rank,
    seeds,
    split,
    told,
    uncollapsed,
)
from scclr.config.errors import UserError
from scclr.report.runs import Run
from scclr.report.statistics import correlation, difference, estimate, holm
from scclr.report.units import probability
from scclr.run.files import read_json
from scclr.theory.moments import COLLAPSED

REPEL, S_B, I_B_H = "theory/repel", "theory/z/s_b", "theory/h/i_b"
LEAST_RHO, LEAST_ALPHAS, SAME = 0.9, 4, 0.05
STANDARD_ERRORS, FALSE_ALARMS = 3, 50  # one run in so many may be outside
SE = f"{DIFFERENCE}/se"
QUALITY = {f"quality/{x}/{name}": name for x in "hz" for name in ("rankme", "lidar", "alpha_req")}


def measure(runs: Runs) -> list[Run]:
    """The runs with the repulsion of ``theory.json`` at their own temperature, and what E7 needs.

    Raises:
        UserError: a ``theory.json`` is missing or damaged.
    """
    found = []
    for run in runs:
        path = run.directory / "theory.json"
        try:
            theory = read_json(path)
            (own,) = (one for one in theory["bound"] if one["temperature"] == theory["temperature"])
            repel = float(own["repel_decoupled"]["value"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: missing or damaged; type the command of the run with overwrite=true") from error
        found.append(replace(run, numbers={**run.numbers, REPEL: repel}))
    return with_differences(found)


def balance_grid(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=balance_grid; its axes are alpha, loss.temperature and seed.

    E1. Prediction: with alpha, V_aug = 1 - E <F, F'> falls, and the repulsion tau E log E exp(<F, F°> / tau) at the
    training's temperature rises. At exact minimizers this is so without exception. Criterion, at each temperature: over
    the runs that have not collapsed (|mu|^2 <= 0.9), at alphas with two or more of them, the rank correlation with
    alpha is at least 0.9 in absolute value, and no two neighbouring alphas are in the wrong order by more than two
    standard errors over seeds.

    E5b. Prediction: raw B2 does not tell the accuracy (z/ncc-v1/top1) of different alphas, as it is 0 at collapse;
    I_B = B2 / (B2 + S_B) of the runs that have not collapsed does. Criterion, at each temperature: the mean over seeds
    of Spearman's rho of I_B with accuracy over alphas is below 0, and it is below that of B2 over all alphas. It fails
    if B2 predicts as well.

    E7. Prediction: at any checkpoint SupCon with positives from other images only exceeds SimCLR by exactly 2 alpha B2
    / tau. The losses are computed on fresh views of training images, B2 is that of theory.json. Criterion: of the runs
    that have not collapsed, at most one in 50 is off by more than three standard errors. Undecided if B2 is not itself
    three standard errors above 0 in half of them.

    Quality without labels. Prediction of their authors: RankMe, LiDAR and -|alpha-ReQ - 1| order runs by accuracy
    (logreg-v1/top1). Criterion: over all runs the rank correlation is above 0.

    z against h, exploratory: does the projector change I_B at alpha = 0.5? It holds if Holm's p over temperatures is
    below 0.05, and fails if the interval is within 0.05.
    """
    found = []
    for temperature, part in split(runs, TEMPERATURE).items():
        at = f"at temperature {temperature:g}"
        found += [_monotone(part, V_AUG, -1, at), _monotone(part, REPEL, 1, at), _bias_and_accuracy(part, at)]
    return [*found, _supcon(runs), *_quality(runs), *_projector(runs)]


def _monotone(runs: Runs, metric: str, sign: int, at: str) -> Verdict:
    parts = {alpha: part for alpha, part in split(uncollapsed(runs), ALPHA).items() if len(part) > 1}
    kept = [run for part in parts.values() for run in part]
    claim = f"E1: {metric} {'rises' if sign > 0 else 'falls'} with alpha {at}"
    if len(parts) < LEAST_ALPHAS or seeds(kept) < LEAST_SEEDS:
        return Verdict(claim, UNDECIDED, f"{len(parts)} alphas have not collapsed, {seeds(kept)} seeds")
    by_alpha = {alpha: list(by_seed(part, metric).values()) for alpha, part in parts.items()}
    rho = float(spearmanr([run.numbers[ALPHA] for run in kept], [run.numbers[metric] for run in kept]).statistic)
    reversals = []
    for (low, a), (high, b) in pairwise(by_alpha.items()):
        error = sqrt(sum((estimate(values).sd or 0.0) ** 2 / len(values) for values in (a, b)))
        if sign * (mean(b) - mean(a)) < -2 * error:
            reversals.append(f"{low:g} to {high:g}")
    means = ", ".join(f"{alpha:g}: {mean(values):.4f}" for alpha, values in by_alpha.items())
    outcome = HOLDS if sign * rho >= LEAST_RHO and not reversals else FAILS
    return Verdict(claim, outcome, f"rho = {rho:+.3f}; reversals: {', '.join(reversals) or 'none'}; {means}")


def _bias_and_accuracy(runs: Runs, at: str) -> Verdict:
    of_b2, of_share = [], []
    for seed in sorted({run.seed for run in runs}):
        members = [run for run in runs if run.seed == seed]
        kept = [run for run in uncollapsed(members) if I_B in run.numbers]
        if len(kept) >= LEAST_ALPHAS:
            b2, share = _rho(members, B2), _rho(kept, I_B)
            if b2 is not None and share is not None:
                of_b2.append(b2)
                of_share.append(share)
    closer = [a - b for a, b in zip(of_b2, of_share, strict=True)]
    outcome = both(above([-rho for rho in of_share]), above(closer))
    text = f"rho of I_B {told(of_share)}; of B2 {told(of_b2)}; B2's minus I_B's {told(closer)}"
    return Verdict(f"E5b: I_B, and not B2, tells the accuracy of different alphas {at}", outcome, text)


def _rho(runs: Runs, metric: str) -> float | None:
    x, y = ([run.numbers[name] for run in runs] for name in (metric, NCC))
    return None if len(set(x)) < 2 or len(set(y)) < 2 else float(spearmanr(x, y).statistic)


def _supcon(runs: Runs) -> Verdict:
    claim = "E7: SupCon with positives from other images exceeds SimCLR by 2 alpha B2 / tau"
    kept = [run for run in uncollapsed(runs) if DIFFERENCE in run.numbers]
    off, powerful = [], 0
    for run in kept:
        numbers = run.numbers
        scale = 2 * numbers[ALPHA] / numbers[TEMPERATURE]
        error = sqrt(numbers[SE] ** 2 + (scale * numbers[f"{B2}/se"]) ** 2)
        off.append((numbers[DIFFERENCE] - scale * numbers[B2]) / error)
        powerful += scale * numbers[B2] > STANDARD_ERRORS * error
    outside = sum(abs(z) > STANDARD_ERRORS for z in off)
    if not kept or 2 * powerful < len(kept) or seeds(kept) < LEAST_SEEDS:
        text = f"B2 is {STANDARD_ERRORS} standard errors above 0 in {powerful} of {len(kept)} runs with a checkpoint"
        return Verdict(claim, UNDECIDED, text)
    text = f"{outside} of {len(kept)} runs beyond {STANDARD_ERRORS} standard errors, the farthest by "
    outcome = HOLDS if outside <= max(1, len(kept) // FALSE_ALARMS) else FAILS
    return Verdict(claim, outcome, f"{text}{max(off, key=abs):+.1f}")


def _quality(runs: Runs) -> list[Verdict]:
    found, accuracy = [], [run.numbers[PROBE] for run in runs]
    for metric, name in QUALITY.items():
        values = [run.numbers[metric] for run in runs if metric in run.numbers]
        if len(values) == len(runs):
            shown, values = (f"-|{metric} - 1|", [-abs(x - 1) for x in values]) if "req" in name else (metric, values)
            rho = correlation(values, accuracy)
            outcome = ordered(rho) if seeds(runs) >= LEAST_SEEDS else UNDECIDED
            found.append(Verdict(f"{shown} orders runs by {PROBE}", outcome, rank(rho)))
    return found


def _projector(runs: Runs) -> list[Verdict]:
    parts = split([run for run in runs if run.numbers[ALPHA] == 0.5], TEMPERATURE)
    made = {}
    for temperature, part in parts.items():
        z, h = by_seed(part, I_B), by_seed(part, I_B_H)
        if len(z.keys() & h.keys()) >= LEAST_SEEDS:
            made[temperature] = ([z[seed] - h[seed] for seed in sorted(z.keys() & h.keys())], difference(z, h).p)
    corrected = iter(holm([p for _, p in made.values() if p is not None]))
    found = []
    for temperature, (values, p) in made.items():
        p = None if p is None else next(corrected)
        claim = f"exploratory: I_B differs between z and h at temperature {temperature:g}"
        found.append(Verdict(claim, differs(values, p, SAME), f"z - h {told(values)}; p {probability(p)}"))
    return found


def draw(runs: Runs) -> Figure:
    """What alpha moves, run by run; a colour for each temperature, a cross where all is one point."""
    shown = {
        PROBE: "accuracy of the linear probe",
        V_AUG: "V_aug, variance between views",
        REPEL: "repulsion",
        B2: "B2, squared bias",
        S_B: "S_B, variance between classes",
    }
    figure = Figure(figsize=(14, 3), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for axis, (metric, label) in zip(axes, shown.items(), strict=True):
        for number, (temperature, part) in enumerate(split(runs, TEMPERATURE).items()):
            for collapsed in (False, True):
                points = [run for run in part if (run.numbers[NORM] > COLLAPSED) == collapsed]
                x, y = ([run.numbers[name] for run in points] for name in (ALPHA, metric))
                text = None if collapsed else f"temperature {temperature:g}"
                axis.plot(x, y, "x" if collapsed else "o", color=f"C{number}", markersize=4, label=text)
        axis.set(xlabel="alpha", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].plot([], [], "x", color="grey", label="collapsed")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


JUDGE = Judge(
    balance_grid,
    axes=(ALPHA, TEMPERATURE),
    needs=(ALPHA, TEMPERATURE, V_AUG, B2, f"{B2}/se", S_B, NORM, NCC, PROBE),
    also=(REPEL, I_B, I_B_H, *QUALITY, DIFFERENCE, SE),
    measure=measure,
    draw=draw,
)

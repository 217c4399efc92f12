"""Whether the best alpha moves with the number of classes."""

from matplotlib.figure import Figure

from judges.best_alpha import MARGIN, curves, judged, listed, moves
from judges.verdict import ALPHA, NCC, TEMPERATURE, Judge, Runs, Verdict, at_most, both, split, told, within
from scclr.report.runs import Run

CLASSES = "dataset.classes"
SMALL = 0.1  # the largest temperature at which the number of classes does not matter


def classes(runs: Runs) -> list[Verdict]:
    """scclr train -m experiment=classes size=cpu_fashion; its axes are dataset.classes, loss.temperature, alpha and
    seed, with as many images whatever the classes are.

    E3. Prediction: a larger alpha collapses classes, which helps where there are few of them (T11). So the alpha with
    the best nearest class centre (z/ncc-v1/top1, of all training labels) does not rise with the number of classes at
    temperatures above 0.1, and stays within 0.05 at 0.1 and below. Criterion, for each two neighbouring numbers of
    classes: by seed, the best alpha among those that were run; the mean change is at most 0.05, by its interval, and at
    small temperatures at least -0.05 too. It fails if a mean change is beyond that. Undecided if the best alpha is at
    the same end of the alphas throughout.
    """
    found = []
    for temperature, part in split(runs, TEMPERATURE).items():
        parts, flat = by_count(part), temperature <= SMALL
        changes = dict(moves(parts, NCC))
        rule = within if flat else at_most
        outcome = judged(part, parts, NCC, both(*(rule(change, MARGIN) for change in changes.values())))
        text = "; ".join(f"{name} {told(change)}" for name, change in changes.items())
        claim = "stays whatever" if flat else "does not rise with"
        claim = f"E3: the best alpha {claim} the number of classes at temperature {temperature:g}"
        found.append(Verdict(claim, outcome, f"{listed(parts, NCC)}; {text}"))
    return found


def by_count(runs: Runs) -> dict[str, list[Run]]:
    """The runs by their number of classes."""
    parts: dict[int | float, list[Run]] = {}
    for run in runs:
        chosen = run.settings.get(CLASSES)
        parts.setdefault(float("inf") if chosen is None else len(chosen), []).append(run)
    return {"all classes" if count == float("inf") else f"{count} classes": parts[count] for count in sorted(parts)}


def draw(runs: Runs) -> Figure:
    """Accuracy against alpha, a panel for each temperature and a line for each number of classes."""
    parts = split(runs, TEMPERATURE)
    return curves({f"temperature {temperature:g}": by_count(part) for temperature, part in parts.items()}, NCC)


JUDGE = Judge(classes, axes=(CLASSES, TEMPERATURE, ALPHA), needs=(ALPHA, TEMPERATURE, NCC), draw=draw)

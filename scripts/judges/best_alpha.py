"""Where the best alpha lies, for the experiments that ask whether it moves with something else."""

from collections.abc import Iterator
from itertools import pairwise

from matplotlib.figure import Figure

from judges.verdict import ALPHA, LEAST_SEEDS, UNDECIDED, Runs, mean, split
from scclr.report.runs import Run

MARGIN = 0.05  # of alpha
Best = dict[int, float]  # by seed


def best_alpha(runs: Runs, metric: str) -> Best:
    """The alpha with the largest metric, by seed; of several with the same, their mean."""
    found = {}
    for seed in sorted({run.seed for run in runs}):
        own = [run for run in runs if run.seed == seed]
        most = max(run.numbers[metric] for run in own)
        found[seed] = mean(run.numbers[ALPHA] for run in own if run.numbers[metric] == most)
    return found


def moves(parts: dict[str, list[Run]], metric: str) -> Iterator[tuple[str, list[float]]]:
    """("A to B", best alpha of B minus that of A by seed) of neighbouring parts."""
    best = {name: best_alpha(part, metric) for name, part in parts.items()}
    for a, b in pairwise(parts):
        yield f"{a} to {b}", [best[b][seed] - best[a][seed] for seed in sorted(best[a].keys() & best[b].keys())]


def at_an_edge(runs: Runs, parts: dict[str, list[Run]], metric: str) -> bool:
    """Whether the best alpha is the smallest, or the largest, of all that were run in every part and for every seed.

    Then where it lies, and whether it moves, is not in these runs.
    """
    found = [alpha for part in parts.values() for alpha in best_alpha(part, metric).values()]
    alphas = {run.numbers[ALPHA] for run in runs}
    return set(found) == {min(alphas)} or set(found) == {max(alphas)}


def listed(parts: dict[str, list[Run]], metric: str) -> str:
    """The best alphas in words, with those of each seed."""
    texts = []
    for name, part in parts.items():
        best = list(best_alpha(part, metric).values())
        texts.append(f"{name}: {mean(best):.3f} ({', '.join(f'{alpha:g}' for alpha in best)})")
    return "best alpha of " + "; ".join(texts)


def judged(runs: Runs, parts: dict[str, list[Run]], metric: str, outcome: str) -> str:
    """``outcome``, unless the runs cannot tell."""
    few = any(len(best_alpha(part, metric)) < LEAST_SEEDS for part in parts.values())
    return UNDECIDED if few or len(parts) < 2 or at_an_edge(runs, parts, metric) else outcome


def curves(panels: dict[str, dict[str, list[Run]]], metric: str) -> Figure:
    """A figure of the metric against alpha, with a line of means for each part and a point for each run."""
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, parts) in zip(axes[0], panels.items(), strict=True):
        for number, (name, part) in enumerate(parts.items()):
            by_alpha = split(part, ALPHA)
            y = [100 * mean(run.numbers[metric] for run in own) for own in by_alpha.values()]
            axis.plot(list(by_alpha), y, color=f"C{number}", label=name)
            x, y = ([run.numbers[key] for run in part] for key in (ALPHA, metric))
            axis.plot(x, [100 * value for value in y], "o", markersize=3, color=f"C{number}")
        axis.set(xlabel="alpha", ylabel=f"{metric}, %", title=title)
        axis.legend(frameon=False, fontsize=8)
    return figure

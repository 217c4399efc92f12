"""The progress of a training on standard error: a bar in a terminal or a notebook, else a line now and then."""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from scclr.run.preemption import SILENT

LINE_SECONDS = 30  # between two lines, where there is no bar
SHOWN = {
    **{"loss": "loss", "attract": "A", "repel": "R", "knn": "kNN", "online/top1": "probe"},
    **{"lr": "lr", "images_per_second": "img/s"},
}
BAR = "{desc} {percentage:3.0f}% |{bar:12}| {elapsed}<{remaining}{postfix}"
TIMES = "{desc} {percentage:3.0f}% {elapsed}<{remaining}{postfix}"
BARE = "{percentage:3.0f}%{postfix}"


def shares_terminal() -> bool:
    """Whether other runs print on the same terminal: the points of a sweep, each in a process with a silent stop.

    The processes of one run have such a stop too, and a rank. They share the terminal if a point has launched them.
    """
    parent = multiprocessing.parent_process()
    launched_by_point = parent is not None and parent.name != "MainProcess"
    return SILENT in os.environ and ("RANK" not in os.environ or launched_by_point)


class Progress:
    """The steps of a training that are done.

    Args:
        start: the finished steps at its beginning.
        total: the steps of the whole training.
        say: prints a line.
    """

    def __init__(self, start: int, total: int, epochs: int, say: Callable[[str], None]) -> None:
        self.total, self.epochs, self.say, self.shown = total, epochs, say, time.monotonic()
        drawn = not shares_terminal() and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(
            total=total, initial=start, desc="pretrain", dynamic_ncols=True, disable=not drawn, bar_format=BAR
        )

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of ``step``."""
        known = {name: metrics.get(f"pretrain/{key}") for key, name in SHOWN.items()}
        figures = [f"{name} {_short(value)}" for name, value in known.items() if value is not None]
        figures = [f"epoch {metrics['pretrain/epoch']:.3g}/{self.epochs}", *figures]
        if not self.bar.disable:
            self.bar.bar_format, text = _fit(self.bar, figures)
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.shown >= LINE_SECONDS or step == self.total:
            self.say(f"pretrain {100 * step / self.total:3.0f}% {' '.join(figures)}")
            self.shown = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it stands, so that other lines can follow."""
        self.bar.close()


def _fit(bar: tqdm, figures: Sequence[str]) -> tuple[str, str]:
    """The form of the line, and the figures in it, for the width of the terminal.

    Whole figures, in their order, are worth more than the bar; epoch and loss, the first two, more than the times.
    """
    state = bar.format_dict
    columns = state["ncols"] or math.inf  # a notebook has no width
    counts = range(len(figures), 0, -1)
    for form, n in [(BAR, len(figures)), *((TIMES, n) for n in counts if n >= 2), *((BARE, n) for n in counts)]:
        text = " ".join(figures[:n])
        if len(tqdm.format_meter(**{**state, "bar_format": form, "ncols": None, "postfix": text})) <= columns:
            return form, text
    return BARE, figures[-1]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

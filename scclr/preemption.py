"""When a run saves, and how it stops: on a signal it finishes its step, writes a checkpoint and exits with code 75."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NOT_DUE, SAVE, LEAVE = 0, 1, 2
SHARE = 0.02  # of the time is what checkpoints by the clock may take


class Stop:
    """Signals that end a run early; a context manager.

    Outside ``deferred`` they end it at once. Inside, the first one is noted, for ``Pace`` to act on between two steps;
    a second one does not wait.

    A signal that was ignored before stays so, as Ctrl-C does for a command in the background. A handler that was there
    has the last word: Python's own turns Ctrl-C into ``KeyboardInterrupt``, submitit's queues the job again,
    or goes on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.previous = {number: signal.signal(number, self._take) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for ``leave``."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _take(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again or not self.waits:
            self.leave()

    def leave(self) -> None:
        """End the run.

        Raises:
            SystemExit: with code 75, unless an older handler does something else.
        """
        number, self.signal = self.signal, None
        older = self.previous.get(number) if number is not None else None
        if callable(older):
            older(number, None)
            return
        name = signal.Signals(number).name if number is not None else "a signal to another process"
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by {name}; type the same command to go on", file=sys.stderr)
        raise SystemExit(STOPPED)


class Pace:
    """When to write a checkpoint: every so many steps or seconds, after the last step, and before a signal is obeyed.

    By the clock, saving takes at most 2 % of the time: after a slow one the next waits longer.

    Args:
        total: steps of the whole training.
    """

    def __init__(self, *, steps: int | None, seconds: float | None, total: int, stop: Stop) -> None:
        self.steps, self.seconds, self.total, self.stop = steps, seconds, total, stop
        self.clock, self.asked, self.cost = time.monotonic(), 0.0, 0.0

    def due(self, done: int) -> int:
        """``LEAVE``, ``SAVE`` or ``NOT_DUE`` after ``done`` steps; the greatest over processes is what they all do."""
        self.asked = time.monotonic()
        if self.stop.signal is not None:
            return LEAVE
        by_steps = self.steps is not None and done % self.steps == 0
        by_clock = self.seconds is not None and self.asked - self.clock >= max(self.seconds, self.cost / SHARE)
        return SAVE if by_steps or by_clock or done == self.total else NOT_DUE

    def saved(self, due: int) -> None:
        """A checkpoint was written because of ``due``."""
        self.clock = time.monotonic()
        self.cost = self.clock - self.asked
        if due == LEAVE:
            self.stop.leave()

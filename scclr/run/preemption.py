"""When a run saves, and how it stops: after a signal it finishes its step, writes a checkpoint and exits with 75."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any, NoReturn

from scclr.run import torchrun

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SILENT = "SCCLR_SILENT_STOP"  # in the environment of processes whose launcher says that they were stopped
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECONDS = 3.0  # a signal to a whole job reaches its processes twice: from the sender and from their launcher
NOT_DUE, SAVE, LEAVE = 0, 1, 2
SHARE = 0.02  # the largest share of the time that checkpoints by the clock may take


class Stop:
    """A context manager in which signals end a run early, in an orderly way.

    Outside ``deferred`` the first signal ends it at once. Inside, the first signal is only noted, and
    ``CheckpointSchedule`` acts on it between two steps. More signals are ignored for ``REPEAT_SECONDS``, also while the
    process ends after that; a later one ends the run at once.

    A signal that was ignored before stays ignored, such as Ctrl-C for a command in the background. The handler that
    was installed before is called last and decides what happens: Python's own turns Ctrl-C into ``KeyboardInterrupt``,
    submitit's puts the job back into the queue, or lets it go on, and an outer ``Stop`` ends the command.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # noted, and not yet acted upon
        self.waits = False
        self.first: float | None = None  # when the first signal came
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self.previous = {number: _older(number, signal.signal(number, self._take)) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            ends = self.first is not None and handler in (signal.SIG_DFL, signal.default_int_handler)
            signal.signal(number, self._take_late if ends else handler)

    def _take_late(self, number: int, _: FrameType | None) -> None:
        """The handler after the context, if a signal came in it: as before the context, but not for a repeat."""
        assert self.first is not None
        if time.monotonic() - self.first >= REPEAT_SECONDS:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait for ``leave``."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _take(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is not None and now - self.first < REPEAT_SECONDS:
            return
        again, self.signal, self.first = self.signal is not None, number, now
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
        stop_process(signal.Signals(number).name if number is not None else "a signal to one of its processes")


def _older(number: int, handler: Any) -> Any:
    """The handler that was there before a ``Stop`` that has ended."""
    late = getattr(handler, "__func__", None) is Stop._take_late
    return handler.__self__.previous[number] if late else handler


@atexit.register
def _ignore_repeats() -> None:
    """Ignore repeats while the interpreter ends, which puts back the default of signals that have a handler."""
    for number in SIGNALS:
        if _older(number, handler := signal.getsignal(number)) is not handler:
            signal.signal(number, signal.SIG_IGN)


def stop_process(cause: str) -> NoReturn:
    """Exit with code 75, after a line on standard error from the process that speaks for the run.

    That is the main one of those that torchrun started, or the one that launched the others.
    """
    if SILENT not in os.environ and torchrun.is_main():
        with suppress(RuntimeError):  # the signal came while this process was printing
            print(f"stopped by {cause}; type the same command to go on", file=sys.stderr)
    raise SystemExit(STOPPED)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Let signals wait. A process that is started meanwhile gets none of them, until it unblocks them itself."""
    older = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, older)


def start_fork_server() -> None:
    """Start the process that forks others, unless it runs. It goes on importing when this returns.

    Signals wait in it and in what it forks, so that one to the whole process group ends none of them. multiprocessing's
    resource tracker starts first, because its start lets SIGINT and SIGTERM through again.
    """
    for helper in (resource_tracker, forkserver):
        with blocked_signals():
            helper.ensure_running()


class CheckpointSchedule:
    """When to write a checkpoint: every so many steps or seconds, after the last step, and before a signal is obeyed.

    By the clock, writing takes at most 2 % of the time: after a slow write the next one waits longer.

    Args:
        total: the number of steps of the whole training.
    """

    def __init__(self, *, steps: int | None, seconds: float | None, total: int, stop: Stop) -> None:
        self.steps, self.seconds, self.total, self.stop = steps, seconds, total, stop
        self.last_saved, self.asked, self.cost = time.monotonic(), 0.0, 0.0

    def due(self, done: int) -> int:
        """``LEAVE``, ``SAVE`` or ``NOT_DUE`` after ``done`` steps. All processes do the greatest of their answers."""
        self.asked = time.monotonic()
        if self.stop.signal is not None:
            return LEAVE
        by_clock = self.seconds is not None and self.asked - self.last_saved >= max(self.seconds, self.cost / SHARE)
        return SAVE if by_clock or self.counted(done) else NOT_DUE

    def counted(self, done: int) -> bool:
        """Whether the count of steps makes a checkpoint due after ``done`` steps, in every process alike."""
        return done == self.total or (self.steps is not None and done % self.steps == 0)

    def saved(self, due: int) -> None:
        """Note that a checkpoint was written because of ``due``; stops the run if that is ``LEAVE``."""
        self.last_saved = time.monotonic()
        self.cost = self.last_saved - self.asked
        if due == LEAVE:
            self.stop.leave()

"""Several points of a sweep at the same time, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, TypeVar

from scclr.run.machine import AT_ONCE, available_cores
from scclr.run.output import survive_closed_output
from scclr.run.preemption import SIGNALS, SILENT, Stop, start_fork_server

P = TypeVar("P")
POLL_SECONDS = 0.2  # how soon a signal to this process is passed on


def run_points(
    work: Callable[[P], Any],
    points: Sequence[P],
    jobs: int,
    *,
    killed: Callable[[P, str], Any],
    preload: Sequence[str],
) -> None:
    """Call ``work(point)`` for every point, each in a new process, at most ``jobs`` of them at the same time.

    A process that fails, is killed or is stopped by a signal of its own costs its point only: the others go on and the
    remaining points start. A signal to this process or to its group stops the sweep: no other point starts, and the
    running ones save and exit before this returns. They do so too if this process is killed.

    The cores are divided among the processes: threads, unless ``OMP_NUM_THREADS`` is set, and workers that read images.

    Args:
        work: a function at the top of a module. It and the points are pickled.
        killed: called with a point and the name of the signal, such as ``SIGKILL``, that killed its process.
        preload: modules to import once for all processes.

    Raises:
        SystemExit: with code 75, after a signal.
        KeyboardInterrupt: after SIGINT.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    os.environ[AT_ONCE] = str(jobs)
    os.environ["PYTHONSAFEPATH"] = "1"  # the server would look for modules in the current folder first
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    waiting = list(points)
    running: dict[Any, tuple[Any, P]] = {}  # process and point, by the pipe that closes when the process ends
    with Stop() as stop, stop.deferred():
        try:
            while (waiting or running) and stop.signal is None:
                if waiting and len(running) < jobs:
                    point = waiting.pop(0)
                    end, process = _start(work, point)
                    running[end] = process, point
                    continue
                for end in wait(list(running), POLL_SECONDS):
                    process, point = running.pop(end)
                    process.join()
                    if process.exitcode < 0:
                        killed(point, signal.Signals(-process.exitcode).name)
        finally:
            for process, _ in running.values():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
            for end, (process, _) in running.items():
                wait([end])
                process.join()
        if stop.signal is not None:
            stop.leave()


def _start(work: Callable[[P], Any], point: P) -> tuple[Any, Any]:
    """Start a process; returns a pipe that closes when it ends, even if the server that forked it was killed."""
    start_fork_server()
    context = multiprocessing.get_context("forkserver")
    end, held = context.Pipe(duplex=False)
    process = context.Process(target=_run_point, args=(work, point, held))
    process.start()
    held.close()
    return end, process


def _run_point(work: Callable[[P], Any], point: P, held: Any) -> None:
    """``work(point)`` in its process, which has inherited that signals wait. ``held`` stays open until it ends."""
    survive_closed_output()
    os.environ[SILENT] = "1"
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt), Stop():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        work(point)


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)

"""Starting the processes of one run on this machine."""

import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scclr.config.errors import UserError, one_line
from scclr.run.lock import HeldError
from scclr.run.output import survive_closed_output
from scclr.run.preemption import SIGNALS, SILENT, STOPPED, Stop, stop_process


def launch(work: Callable[[Any], None], argument: Any, processes: int) -> None:
    """Call ``work(argument)`` in new processes that torchrun's agent starts; they share the threads of this process.

    A process that fails ends the others.

    Raises:
        UserError: a process raised an error, or was killed. The message names its rank and is that of the error. The
            traceback of an error that is no ``UserError`` was printed before.
        SystemExit, KeyboardInterrupt: a signal stopped them, after their checkpoint.
    """
    start_resource_tracker()
    variables = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)), SILENT: "1"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with environment(**variables), _relayed_signals(), _no_logging():
                elastic_launch(_agent(processes, folder), _rank)(work, argument, folder)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from stop
            stop_process(stop.sigval.name)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == STOPPED:
                stop_process("a signal to one of its processes")
            raise _failure(rank, failure.exitcode, _report(folder, rank)) from error


def _agent(processes: int, logs: str) -> LaunchConfig:
    # The agent would also heed signals that are ignored, such as nohup's SIGHUP. Older versions of it cannot be told.
    names = ",".join(number.name for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
    known = "signals_to_handle" in {field.name for field in fields(LaunchConfig)}
    signals: dict[str, Any] = {"signals_to_handle": names} if known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        **signals,
    )


def _rank(work: Callable[[Any], None], argument: Any, folder: str) -> None:
    """``work`` in one of the processes. The message of an error goes into a file, which the launching process reads."""
    survive_closed_output()
    try:
        with Stop():
            work(argument)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        message = f"{type(error).__name__}: {one_line(error)}"
        _report(folder, int(os.environ["RANK"])).write_text(message, errors="backslashreplace")
        sys.exit(1)


def _report(folder: str, rank: int) -> Path:
    return Path(folder, f"error-{rank}")


def _failure(rank: int, code: int, report: Path) -> UserError:
    if code < 0:
        advice = "type the command again to go on from the last checkpoint"
        return UserError(f"rank {rank} was killed by {signal.Signals(-code).name}; {advice}")
    if not report.exists():
        return UserError(f"rank {rank} exited with code {code}")
    message = report.read_text()
    kind, _, text = message.partition(": ")
    if kind == HeldError.__name__:
        return HeldError(f"rank {rank}: {text}")
    return UserError(f"rank {rank}: {text if kind == UserError.__name__ else message}")


@contextmanager
def _relayed_signals() -> Iterator[None]:
    """Let signals that the agent does not know stop it as SIGTERM does. All handlers are put back at the end."""
    older = {number: signal.getsignal(number) for number in SIGNALS}
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if older[number] != signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in older.items():
            signal.signal(number, handler)


@contextmanager
def _no_logging() -> Iterator[None]:
    """Keep the agent from printing tables around our one line."""
    older = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(older)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Let signals wait. A process that is started meanwhile gets none of them, until it unblocks them itself."""
    older = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, older)


def start_resource_tracker() -> None:
    """Start the helper process of multiprocessing so that it outlives a signal to the whole process group.

    By itself it ignores SIGTERM and SIGINT only, and tracebacks follow when it ends before the others.
    """
    with blocked_signals():
        resource_tracker.ensure_running()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables in the environment, for the processes that are started meanwhile."""
    older = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in older.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

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
from scclr.run import distributed, machine
from scclr.run.files import storage_error
from scclr.run.lock import HeldError
from scclr.run.output import survive_closed_output
from scclr.run.preemption import SIGNALS, SILENT, STOPPED, Stop, blocked_signals, stop_process

HELD = 3  # the exit code of a rank that raised ``HeldError``


def launch(work: Callable[[Any], None], argument: Any, processes: int) -> None:
    """Call ``work(argument)`` in new processes that torchrun's agent starts; they share the threads of this process.

    A process that fails ends the others.

    Raises:
        UserError: a process raised an error, or was killed. The message names its rank and is that of the error. The
            traceback of an error that is no ``UserError`` was printed before.
        SystemExit, KeyboardInterrupt: a signal stopped them, after their checkpoint.
    """
    with blocked_signals():  # a signal to the group would end multiprocessing's helper before the processes
        resource_tracker.ensure_running()
    threads = max(1, torch.get_num_threads() // processes)
    with Stop(), tempfile.TemporaryDirectory() as folder:  # `Stop` also puts back the handlers that the agent replaces
        logging.disable(logging.CRITICAL)  # the agent would print tables around our one line
        try:
            elastic_launch(_agent(processes, folder), _rank)(work, argument, folder, threads)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from stop
            stop_process(stop.sigval.name)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == STOPPED:
                stop_process("a signal to one of its processes")
            raise _failure(rank, failure.exitcode, _report(folder, rank)) from error
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def working(device: torch.device, deterministic: bool | None) -> Iterator[tuple[torch.device, Stop]]:
    """What each process of a run works in: its group, signals, kernels, and errors of the disk in one line.

    Args:
        deterministic: use only kernels that repeat bit by bit; None: on a CPU.

    Yields:
        This process's own device, and what signals ask for.
    """
    machine.keep_freed_memory()
    try:
        with Stop() as stop, distributed.process_group(device) as own:
            repeatable = own.type == "cpu" if deterministic is None else deterministic
            with machine.deterministic_kernels(repeatable):
                yield own, stop
    except OSError as error:
        raise storage_error(error) or error from error


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


def _rank(work: Callable[[Any], None], argument: Any, folder: str, threads: int) -> None:
    """``work`` in one of the processes. The message of an error goes into a file, which the launching process reads."""
    survive_closed_output()
    os.environ[SILENT] = "1"
    torch.set_num_threads(threads)
    try:
        with Stop():
            work(argument)
    except Exception as error:
        message = one_line(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
            message = f"{type(error).__name__}: {message}"
        _report(folder, int(os.environ["RANK"])).write_text(message, errors="backslashreplace")
        sys.exit(HELD if isinstance(error, HeldError) else 1)


def _report(folder: str, rank: int) -> Path:
    return Path(folder, f"error-{rank}")


def _failure(rank: int, code: int, report: Path) -> UserError:
    if code < 0:
        advice = "type the command again to go on from the last checkpoint"
        return UserError(f"rank {rank} was killed by {signal.Signals(-code).name}; {advice}")
    if not report.exists():
        return UserError(f"rank {rank} exited with code {code}")
    kind = HeldError if code == HELD else UserError
    return kind(f"rank {rank}: {report.read_text()}")

"""How a run is placed on its machine: processes, their threads and memory, and kernels that repeat bit by bit."""

import ctypes
import logging
import os
import platform
import signal
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scclr.config import UserError
from scclr.preemption import SIGNALS, STOPPED

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**29  # bytes


def keep_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors.

    Its own thresholds start at 128 KiB and follow what was freed before. A block that goes back to the kernel comes
    again page by page, each cleared: on a CPU that can take longer than the operation that fills it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT // 2)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def spread(work: Callable[[Any], None], argument: Any, processes: int) -> None:
    """``work(argument)`` in new processes as torchrun starts them, on this machine; the host's threads are divided.

    A process that fails ends the others.

    Raises:
        UserError: what a process raised as such, or that one was killed; names its rank.
        RuntimeError: any other error of a process, after its traceback.
        SystemExit, KeyboardInterrupt: they were stopped by a signal, after their checkpoint.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it would print tables around our one line
    threads = max(1, torch.get_num_threads() // processes)
    with environment(OMP_NUM_THREADS=str(threads)), _relayed():
        try:
            elastic_launch(config, _reported)(work, argument)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from stop
            raise SystemExit(STOPPED) from stop
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == STOPPED:
                raise SystemExit(STOPPED) from error
            kind, _, text = str(failure.message).partition(": ")
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                advice = "type the command again to go on from the last checkpoint"
                raise UserError(f"rank {rank} was killed by {name}; {advice}") from error
            if kind == UserError.__name__:
                raise UserError(f"rank {rank}: {text}") from error
            raise RuntimeError(f"rank {rank}: {str(failure.message).splitlines()[0]}") from error


def _reported(work: Callable[[Any], None], argument: Any) -> None:
    """``work`` with errors that the launching process can tell apart."""
    try:
        work(argument)
    except UserError as error:
        raise UserError(str(error)) from None
    except Exception:
        traceback.print_exc()
        raise


@contextmanager
def _relayed() -> Iterator[None]:
    """Every signal that stops a run reaches the processes as SIGTERM; handlers are put back at the end."""
    older = {number: signal.getsignal(number) for number in SIGNALS}
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        for number, handler in older.items():
            signal.signal(number, handler)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables that the processes started meanwhile find in their environment."""
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


@contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Kernels that give the same bits on the same machine and thread count, where ``on``.

    On CUDA cuBLAS takes its setting from the environment when it starts.

    Raises:
        RuntimeError: an operation has no such kernel; PyTorch names it.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it guards against reading it, at the cost of a pass
    torch.backends.cudnn.benchmark = not on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.benchmark = was[1]

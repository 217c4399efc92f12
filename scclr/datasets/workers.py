"""Worker processes that read images before they are needed.

They are forked from a server, a process that has imported this package and does nothing else. A fork of the training
process would copy the locks of its other threads, such as those of CUDA, NCCL and W&B, in whatever state they are.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from scclr.config.errors import UserError, one_line
from scclr.run.preemption import SIGNALS, start_fork_server

PRELOAD = ["scclr.datasets.loader"]  # all that a worker imports, but for components of the user's own

T = TypeVar("T")


def read_ahead(job: Callable[[int], T], keys: Sequence[int], workers: int, pin: bool = False) -> Iterator[T]:
    """``job(key)`` for all ``keys`` in order, computed ahead of its use by worker processes.

    Args:
        job: is pickled for the workers, so its class lies at the top of a module.
        workers: their number; 0 computes in this process when a result is needed.
        pin: copy tensors to page-locked memory.

    Raises:
        UserError: ``job`` cannot be sent to a worker, or a worker was killed.
    """
    workers = max(0, min(workers, len(keys) - 1))  # one job gains nothing from a process of its own
    with warnings.catch_warnings():  # of more workers than cores, or about an error that is raised anyhow
        warnings.filterwarnings("ignore", "This DataLoader will create|Got pickle error")
        loader = DataLoader(
            _Jobs(job),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            pin_memory=pin,
            multiprocessing_context="forkserver" if workers > 0 else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the global generator
        )
        if workers > 0:
            start_server()
        with _without_main():
            try:
                stream = iter(loader)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                advice = "define it in a module of its own, or type dataset.workers=0"
                raise UserError(f"worker processes do not find a component ({one_line(error)}); {advice}") from error
    try:
        yield from stream
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        advice = "type a smaller dataset.workers, or give more shared memory (docker run --shm-size=8g)"
        raise UserError(f"{one_line(error)}; {advice}") from error


def start_server() -> None:
    """Start the server of the workers, unless it runs.

    A signal to the whole process group must end no worker: it asks the training process to save and leave, which needs
    its workers until then.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    older = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # the server would look for modules in the current folder first
    try:
        start_fork_server()
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if older is not None:
            os.environ["PYTHONSAFEPATH"] = older


@contextmanager
def _without_main() -> Iterator[None]:
    """Let processes that start meanwhile not run the user's script, which may call ``scclr.train`` without a guard."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _start_worker(worker: int) -> None:
    """Ignore signals, also if another program has started the server, and end at once with the training process.

    PyTorch's own check watches the server instead, which does not end before its workers.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


class _Jobs(Dataset[T]):
    def __init__(self, job: Callable[[int], T]) -> None:
        self.job = job

    def __getitem__(self, key: int) -> T:
        return self.job(key)

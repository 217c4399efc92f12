"""Worker processes that read images before they are needed."""

import ctypes
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from scclr.config.errors import UserError, one_line

# A signal to the whole process group asks the training process to save and leave. It needs its workers until then.
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

T = TypeVar("T")


def read_ahead(job: Callable[[int], T], keys: Sequence[int], workers: int, pin: bool = False) -> Iterator[T]:
    """``job(key)`` for all ``keys`` in order, computed ahead of its use by worker processes.

    Args:
        workers: their number; 0 computes in this process when a result is needed.
        pin: copy tensors to page-locked memory.

    Raises:
        UserError: a worker was killed.
    """
    workers = min(workers, len(keys) - 1)  # one job gains nothing from a process of its own
    # A fork takes a moment only, and the workers never touch CUDA.
    context = "fork" if workers > 0 and sys.platform == "linux" else None
    with warnings.catch_warnings():  # somebody who types a number of workers may know better than PyTorch
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            _Jobs(job),
            batch_size=None,
            sampler=keys,
            num_workers=max(0, workers),
            pin_memory=pin,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the global generator
        )
        stream = iter(loader)
    try:
        yield from stream
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        advice = "type a smaller dataset.workers, or give more shared memory (docker run --shm-size=8g)"
        raise UserError(f"{one_line(error)}; {advice}") from error


def _start_worker(worker: int) -> None:
    """Ignore the signals of the process group, and end at once when the training process ends.

    PyTorch's own check takes up to 5 seconds, in which an orphan would hold the locks of a killed run.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Jobs(Dataset[T]):
    def __init__(self, job: Callable[[int], T]) -> None:
        self.job = job

    def __getitem__(self, key: int) -> T:
        return self.job(key)

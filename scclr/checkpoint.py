"""A run folder and its files, which are either whole or not there."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from scclr.config import UserError, checkpoint_path, one_line


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it; a failure leaves an older ``path`` as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; the previous checkpoint is kept.
    """
    try:
        write_atomic(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        raise UserError(
            f"{path}: cannot write the checkpoint ({one_line(error)}); free space and type the command again"
        ) from error


def load(source: str | Path) -> dict[str, Any]:
    """The checkpoint of a run folder, or the file itself, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        UserError: nothing there, or not a checkpoint of scclr.
    """
    path = checkpoint_path(source)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for what is not a checkpoint
        raise UserError(f"{path}: not a checkpoint; give a run folder or its last.pt") from error
    if not isinstance(state, dict) or not {"model", "config"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of scclr (no 'model' and 'config' in it); give a run's last.pt")
    return state


@contextmanager
def claimed(directory: Path, overwrite: bool) -> Iterator[None]:
    """The run folder, made if need be and held against other processes; emptied of an older run if ``overwrite``.

    Raises:
        UserError: it cannot be written, or another process is in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{directory}: cannot write there ({error.strerror}); type runs=<a folder of yours>") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, also after a crash
        except OSError as error:
            raise UserError(f"{directory}: another process is at work on this run; wait for it") from error
        if overwrite:
            for name in ("result.json", "last.pt", "metrics.jsonl"):
                (directory / name).unlink(missing_ok=True)
        try:
            yield
        except OSError as error:
            raise UserError(f"{directory}: {one_line(error)}; free space and type the command again") from error

"""A run folder and its files, which are either whole or not there."""

import fcntl
import hashlib
import io
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from scclr.config import UserError, checkpoint_path, one_line, require

GENERATIONS = ("last.pt", "previous.pt")
FORMAT = 1  # of what a checkpoint holds; another one cannot be resumed
DISCARDED = ("result.json", *GENERATIONS, "crash.pt", "metrics.jsonl", "error.txt")  # by overwrite=true
MARK = b"sha256:"
COMMENT = len(MARK) + 64


class HeldError(UserError):
    """Another process is at work in the run folder."""


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any], keep: Path | None = None) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it; a failure leaves an older ``path`` as it was.

    Args:
        keep: where the older ``path`` goes instead of being replaced.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


def save(directory: Path, state: dict[str, Any], name: str = GENERATIONS[0]) -> None:
    """Write a checkpoint atomically; the one before it stays as ``previous.pt``.

    The file is what ``torch.save`` writes, a zip archive, with the SHA-256 of everything before it as its comment.

    Raises:
        UserError: the disk is full or the folder cannot be written; the previous checkpoint is kept.
    """
    path, buffer = directory / name, io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    data = buffer.getbuffer()
    data[-2:] = COMMENT.to_bytes(2, "little")  # the length of the comment ends an archive without one
    comment = MARK + hashlib.sha256(data).hexdigest().encode()

    def write(file: IO[bytes]) -> None:
        file.write(data)
        file.write(comment)

    try:
        require_room(directory, len(data))
        write_atomic(path, write, keep=directory / GENERATIONS[1] if name == GENERATIONS[0] else None)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the checkpoint ({one_line(error)}); free space and type the command again"
        ) from error


def load(source: str | Path) -> dict[str, Any]:
    """The checkpoint of a run folder, or the file itself, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        UserError: nothing there, a file cut short or altered, or not a checkpoint of scclr.
    """
    path = checkpoint_path(source)
    data = path.read_bytes()
    body, comment = memoryview(data)[:-COMMENT], data[-COMMENT:]
    if not comment.startswith(MARK) or not data.startswith(b"PK"):
        raise UserError(f"{path}: not a checkpoint of scclr, or cut short; give a run folder or its last.pt")
    if comment != MARK + hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path}: altered since it was written (its checksum is another); give an intact one")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def resume(directory: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run folder; None where there is none yet.

    A damaged generation is named on standard error and set aside as ``damaged.pt``.

    Raises:
        UserError: there are checkpoints, all of them damaged; or the run is another version's of scclr.
    """
    damage = None
    for path in (directory / name for name in GENERATIONS):
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            damage = error
            os.replace(path, directory / "damaged.pt")
            print(f"{one_line(error)}: set aside as damaged.pt", file=sys.stderr)
            continue
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path}: another version of scclr left this run unfinished; type overwrite=true to begin anew"
            )
        if damage is not None:
            print(f"going on from {path.name}, at step {state['step']}", file=sys.stderr)
        return state
    require(damage is None, f"{directory}: no intact checkpoint is left; type overwrite=true to begin anew")
    return None


def require_room(folder: Path, size: int) -> None:
    """Raise ``UserError`` unless the disk of ``folder``, or of the nearest one that exists, takes ``size`` bytes."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    message = f"{folder}: {size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free on its disk; free space"
    require(size <= free, f"{message}, or type runs=<a folder on another disk>")


@contextmanager
def claimed(directory: Path, overwrite: bool) -> Iterator[None]:
    """The run folder, made if need be and held against other processes; emptied of an older run if ``overwrite``.

    Raises:
        HeldError: another process is in it; names it.
        UserError: it cannot be written, or can no more.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{directory}: cannot write there ({error.strerror}); type runs=<a folder of yours>") from error
    with lock:
        _take(lock, directory)
        for name in DISCARDED if overwrite else ("error.txt",):
            (directory / name).unlink(missing_ok=True)
        try:
            yield
        except OSError as error:
            raise UserError(f"{directory}: {one_line(error)}; free space and type the command again") from error


def _take(lock: IO[str], directory: Path) -> None:
    for attempt in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, also after a crash
        except BlockingIOError as error:
            if attempt < 4:
                time.sleep(0.05)  # `held` takes it for a moment
                continue
            lock.seek(0)
            raise HeldError(
                f"{directory}: another process is at work on this run ({lock.read().strip()}); wait for it"
            ) from error
        except OSError as error:
            advice = "start this run only once at a time"
            print(f"{directory}: its file system has no locks ({error.strerror}): {advice}", file=sys.stderr)
        break
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def held(directory: Path) -> bool:
    """Whether a process is at work in the run folder."""
    try:
        with open(directory / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

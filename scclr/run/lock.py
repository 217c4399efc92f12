"""Locks between processes: one process at a time works in a run folder.

They are locks of the kernel on files (``flock``), which it frees when their process ends, also by a crash.
"""

import errno
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from scclr.config.errors import UserError, require
from scclr.run.files import GENERATIONS, folder_error, remove_partials, run_folder_error, write_text

LOCK, HOLDER = ".lock", ".holder"  # the locked file, and the name of the process that holds it
DISCARDED = (  # by overwrite=true
    *("result.json", *GENERATIONS, "damaged.pt", "crash.pt"),
    *("metrics.jsonl", "theory.json", "views.png", "error.txt"),
)
EVALUATIONS = "evaluations"  # the folder of what ``scclr evaluate`` adds to a run; it is discarded too
KEPT = (*GENERATIONS, "crash.pt", "metrics.jsonl", "result.json")  # with contents, they keep a failed run's folder
PATIENCE = 0.25  # seconds to wait for a lock, since `is_locked` in another process takes it for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without them


class HeldError(UserError):
    """Another process holds a lock, such as that of the run folder."""


@contextmanager
def run_lock(directory: Path, overwrite: bool) -> Iterator[None]:
    """Hold the run folder against other processes; it is made if it does not exist.

    What a killed attempt left half-written is deleted, and with ``overwrite`` every file of an older run. An attempt
    that made the folder and fails before it has a row or a checkpoint leaves nothing.

    Raises:
        HeldError: another process holds the folder; the message names the process.
        UserError: nothing can be written there, its disk is full or read-only, or it is deleted, now or at any time
            later.
    """
    holder, made = directory / HOLDER, list[Path]()
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            _make_folders(directory, made)
            stack.enter_context(file_lock(directory / LOCK, PATIENCE))
        except HeldError:
            name = "its number is not known"
            with suppress(OSError):
                name = holder.read_text(errors="replace").strip()
            raise HeldError(f"{directory}: another process works on this run ({name}); wait for it") from None
        except OSError as error:
            raise folder_error(error, directory) from error
        try:
            write_text(holder, f"pid {os.getpid()} on {socket.gethostname()}\n")
            remove_partials(directory)
            for name in DISCARDED if overwrite else ("error.txt",):
                (directory / name).unlink(missing_ok=True)
            if overwrite:
                shutil.rmtree(directory / EVALUATIONS, ignore_errors=True)
            yield
        except Exception as error:
            known = run_folder_error(error, directory) if isinstance(error, OSError) else None
            if directory in made and not any(_has_bytes(directory / name) for name in KEPT):
                shutil.rmtree(directory, ignore_errors=True)
            if known is None:
                raise
            raise known from error
        finally:
            with suppress(OSError):
                holder.unlink()


def _make_folders(directory: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and put the new ones into ``made``, the deepest first."""
    for path in [path for path in (*reversed(directory.parents), directory) if not path.exists()]:
        with suppress(FileExistsError):  # another process was faster
            path.mkdir()
            made.insert(0, path)
    directory.mkdir(parents=True, exist_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # the first that is not empty, or is removed already
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def _has_bytes(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``. On a file system without locks, print advice and go on.

    Raises:
        HeldError: another process holds it, for longer than ``seconds``.
        UserError: ``path`` is a symbolic link.
        OSError: the file cannot be opened.
    """
    require(not path.is_symlink(), f"{path}: a symbolic link where a lock belongs; delete it")
    deadline = time.monotonic() + seconds
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "w") as file:
        while not _try_lock(file, path):
            if time.monotonic() > deadline:
                raise HeldError(f"{path}: another process has held this lock for {seconds:g} s")
            time.sleep(0.02)
        try:
            yield
        finally:
            with suppress(OSError):  # closing alone would leave it to processes that were forked meanwhile
                fcntl.flock(file, fcntl.LOCK_UN)


def _try_lock(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{path.parent}: its file system has no locks; start one command at a time there", file=sys.stderr)
    return True


def is_locked(directory: Path) -> bool:
    """Whether a process works in the run folder.

    The lock that this takes for a moment is a shared one: several may look at once, and permission to read is enough.
    """
    try:
        with open(os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK)) as file:  # a pipe of that name would hang
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

"""Locks between processes: one process at a time works in a run folder.

They are locks of the kernel on files, which it frees when their process ends, also by a crash.
"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scclr.config.errors import UserError, require
from scclr.run.checkpoint import GENERATIONS
from scclr.run.files import folder_error, remove_partials, storage_error, write_text

LOCK, HOLDER = ".lock", ".holder"  # the locked file, and the name of the process that holds it
DISCARDED = (  # by overwrite=true
    *("result.json", *GENERATIONS, "damaged.pt", "crash.pt"),
    *("metrics.jsonl", "theory.json", "views.png", "error.txt"),
)
PATIENCE = 0.25  # seconds to wait for a lock, since `is_locked` in another process takes it for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without them


class HeldError(UserError):
    """Another process works in the run folder."""


@contextmanager
def run_lock(directory: Path, overwrite: bool) -> Iterator[None]:
    """Hold the run folder against other processes; it is made if it does not exist.

    What a killed attempt left half-written is deleted, and with ``overwrite`` every file of an older run.

    Raises:
        HeldError: another process holds the folder; the message names the process.
        UserError: nothing can be written there, or its disk is full or read-only, now or at any time later.
    """
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(directory / LOCK, PATIENCE))
        except Timeout:
            message = f"{directory}: another process works on this run ({_holder(directory)}); wait for it"
            raise HeldError(message) from None
        except OSError as error:
            raise folder_error(error, directory) from error
        stack.callback(_forget_holder, directory)
        try:
            write_text(directory / HOLDER, f"pid {os.getpid()} on {socket.gethostname()}\n")
            remove_partials(directory)
            for name in DISCARDED if overwrite else ("error.txt",):
                (directory / name).unlink(missing_ok=True)
            yield
        except OSError as error:
            if (full := storage_error(error, directory)) is None:
                raise
            raise full from error


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``. On a file system without locks, print advice and go on.

    Raises:
        filelock.Timeout: another process holds it, for longer than ``seconds``.
        UserError: ``path`` is a symbolic link; older versions of filelock would truncate its target.
        OSError: the file cannot be opened.
    """
    require(not path.is_symlink(), f"{path}: a symbolic link where a lock belongs; delete it")
    # Without kernel locks, newer versions of filelock would fall back to a file that outlives a crash.
    options: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    lock = FileLock(path, seconds, **options)
    try:
        lock.acquire(poll_interval=0.02)
    except (OSError, NotImplementedError) as error:  # older versions of filelock raise the latter
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(f"{path.parent}: its file system has no locks; start one command at a time there", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def is_locked(directory: Path) -> bool:
    """Whether a process works in the run folder.

    The lock that this takes for a moment is a shared one, which filelock does not have: several may look at once, and
    reading permission is enough.
    """
    try:
        with open(directory / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _holder(directory: Path) -> str:
    with suppress(OSError):
        return (directory / HOLDER).read_text(errors="replace").strip()
    return "its number is not known"


def _forget_holder(directory: Path) -> None:
    with suppress(OSError):
        (directory / HOLDER).unlink()

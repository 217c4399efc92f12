"""Locks between processes: one process at a time works in a run folder.

They are locks of the kernel on files (``flock``), which it frees when their process ends, also by a crash.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from scclr.config.errors import UserError, require
from scclr.run.files import GENERATIONS, folder_error, remove_partials, storage_error, write_text

LOCK, HOLDER = ".lock", ".holder"  # the locked file, and the name of the process that holds it
DISCARDED = (  # by overwrite=true
    *("result.json", *GENERATIONS, "damaged.pt", "crash.pt"),
    *("metrics.jsonl", "theory.json", "views.png", "error.txt"),
)
PATIENCE = 0.25  # seconds to wait for a lock, since `is_locked` in another process takes it for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without them


class HeldError(UserError):
    """Another process holds a lock, such as that of the run folder."""


@contextmanager
def run_lock(directory: Path, overwrite: bool) -> Iterator[None]:
    """Hold the run folder against other processes; it is made if it does not exist.

    What a killed attempt left half-written is deleted, and with ``overwrite`` every file of an older run.

    Raises:
        HeldError: another process holds the folder; the message names the process.
        UserError: nothing can be written there, or its disk is full or read-only, now or at any time later.
    """
    holder = directory / HOLDER
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
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
            yield
        except OSError as error:
            if (full := storage_error(error, directory)) is None:
                raise
            raise full from error
        finally:
            with suppress(OSError):
                holder.unlink()


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
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as file:
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
        with open(directory / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

"""Failures to read or download files become errors that say which file, and what to do."""

import hashlib
import math
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from scclr.config.errors import UserError, one_line, require
from scclr.run.lock import LOCK, file_lock, is_locked


def check_files(folder: Path, files: Sequence[tuple[str, str | None]], advice: str) -> None:
    """Raise ``UserError`` naming the first of ``files`` (path below ``folder``, MD5) that is missing or corrupt."""
    wait_for_download(folder)
    for name, md5 in files:
        path = folder / name
        require(path.is_file(), f"{path}: no such file; {advice}")
        with reading(path, advice):
            require(md5 in (None, _md5(path)), f"{path}: truncated or corrupt (its MD5 is not {md5}); {advice}")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def wait_for_download(folder: Path) -> None:
    """Return when no other process downloads into ``folder`` or the one above it."""
    while is_locked(folder) or is_locked(folder.parent):
        time.sleep(0.1)


@contextmanager
def downloading(folder: Path, advice: str) -> Iterator[None]:
    """``reading`` for a download into ``folder``, by one process at a time: the others wait here.

    Those that have waited find the files there, and torchvision downloads no file again that is whole. If the download
    fails, folders that it made and left empty are removed.
    """
    lock, made = folder / LOCK, list[Path]()
    while True:
        made = [path for path in (folder, *folder.parents) if path in made or not path.exists()]
        with reading(folder, advice), ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                number = lock.stat().st_ino
                stack.enter_context(file_lock(lock, math.inf))
                if lock.stat().st_ino != number:
                    continue
            except FileNotFoundError:  # the process that had the lock is done, and has deleted its file
                continue
            try:
                yield
            except BaseException:
                _remove(lock, made)
                raise
            _remove(lock, [])
            return


def _remove(lock: Path, folders: Sequence[Path]) -> None:
    lock.unlink(missing_ok=True)
    with suppress(OSError):  # one of them is not empty
        for folder in folders:
            folder.rmdir()


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Any failure to read or download inside the block becomes a ``UserError`` that names ``path`` and ``advice``."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, AssertionError, LookupError, zlib.error) as error:
        raise UserError(f"{path}: {one_line(error) or type(error).__name__}; {advice}") from error

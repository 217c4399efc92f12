"""Files that are either whole or absent, and what is said when a disk does not take them."""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from scclr.config.errors import UserError, one_line, require

GENERATIONS = ("last.pt", "previous.pt")  # the checkpoints of a run, newest first
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any], keep: Path | None = None) -> None:
    """Let ``write`` fill a new file in the same folder, then rename it to ``path``.

    The new file has a random name and is opened only if nothing has that name. So two writers never share a file, and
    no planted symbolic link is followed. If anything fails, an older ``path`` stays as it was.

    Args:
        keep: the older ``path`` is renamed to this instead of being replaced.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
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
        os.fsync(folder)  # makes the renames themselves durable
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically.

    Raises:
        ValueError: a number in it is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as an npz file, compressed, atomically."""
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds something else, such as a number that is not finite, or cannot be read.
    """
    advice = "delete it and type the command again"
    try:
        value = json.loads(read_bytes(path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {advice}") from error
    require(isinstance(value, dict), f"{path}: damaged (not a JSON object); {advice}")
    return dict(value)


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def is_number(value: object) -> bool:
    """Whether something read from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def read_bytes(path: Path) -> bytes:
    """The contents of a file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, or is something else than a file, such as a folder or a pipe.
    """
    try:
        require(stat.S_ISREG(path.stat().st_mode), f"{path}: not a file; delete it and type the command again")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or delete it") from error


def remove_partials(folder: Path) -> None:
    """Delete what writers that were killed have left. The caller holds the lock under which files are written there."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """``path``, or the closest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))


def require_room(folder: Path, size: int) -> None:
    """Raise ``UserError`` unless the disk of ``folder``, which may not exist yet, has ``size`` bytes free."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    message = f"{folder}: {size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free on its disk"
    require(size <= free, f"{message}; free space, or type runs=<a folder on another disk>")


def storage_error(error: OSError, path: Path | None = None) -> UserError | None:
    """What to tell the user if ``error`` says that a disk is full or read-only; None for any other error.

    Args:
        path: what was written, for errors that do not name a file themselves.
    """
    if error.errno not in (*FULL, errno.EROFS):
        return None
    what = error.filename or path or "the disk"
    remedy = "free space" if error.errno in FULL else "make the disk writable"
    return UserError(f"{what}: {error.strerror}; {remedy} and type the command again")


def run_folder_error(error: OSError, folder: Path) -> UserError | None:
    """What to tell the user about an error while a run works in ``folder``; None if that has to do with other files."""
    if not folder.is_dir():
        return UserError(f"{folder}: deleted while the run worked in it; type the command again to begin anew")
    if (full := storage_error(error, folder)) is not None:
        return full
    named = next((Path(str(name)) for name in (error.filename2, error.filename) if name is not None), None)
    if named is None or folder not in named.parents:
        return None
    return UserError(f"{named}: {error.strerror}; delete it, or make it writable, and type the command again")


def folder_error(error: OSError, folder: Path) -> UserError:
    """What to tell the user if nothing can be written into a folder of runs."""
    denied = UserError(f"{folder}: cannot write there ({error.strerror}); type runs=<a folder of yours>")
    return storage_error(error, folder) or denied

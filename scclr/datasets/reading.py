"""Failures to read or download files become errors that say which file, and what to do."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchvision.datasets.utils import check_integrity

from scclr.config.errors import UserError, one_line, require


def check_files(folder: Path, files: Sequence[tuple[str, str | None]], advice: str) -> None:
    """Raise ``UserError`` naming the first of ``files`` (path below ``folder``, MD5) that is missing or corrupt."""
    for name, md5 in files:
        path = folder / name
        require(path.is_file(), f"{path}: no such file; {advice}")
        with reading(path, advice):
            require(check_integrity(str(path), md5), f"{path}: truncated or corrupt (its MD5 is not {md5}); {advice}")


@contextmanager
def downloading(folder: Path, advice: str) -> Iterator[None]:
    """``reading`` for a download into ``folder``; if it fails, folders that it made and left empty are removed."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with reading(folder, advice):
            yield
    except UserError:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Any failure to read or download inside the block becomes a ``UserError`` that names ``path`` and ``advice``."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, AssertionError, LookupError, zlib.error) as error:
        raise UserError(f"{path}: {one_line(error) or type(error).__name__}; {advice}") from error

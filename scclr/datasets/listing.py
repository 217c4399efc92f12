"""The image files in a folder, which may have one folder for each class."""

import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _kind(entry) == "folder")


def list_images(folder: Path, classes: Sequence[str] | None) -> tuple[list[str], list[int], Counter[str]]:
    """The image files below the folders ``classes``, in the order of torchvision's ``make_dataset``: their paths below
    ``folder``, their labels, and how many files of each other kind there are. Without ``classes``, all image files
    below ``folder``, with the label -1.

    Symbolic links are followed, but no folder is read twice: neither in a loop of links, nor under a second class. A
    link never takes a folder from the class in which that folder really lies, so links are followed last. Only regular
    files are taken, since opening a pipe would block.

    Raises:
        OSError: a folder cannot be read.
    """
    queue: deque[tuple[int, str]] = deque([(-1, "")])  # (label, path below folder)
    if classes is not None:
        linked = {name: os.path.islink(folder / name) for name in classes}
        queue = deque(sorted(enumerate(classes), key=lambda item: linked[item[1]]))
    visited = set() if classes is None else {_identity(folder)}
    found: list[tuple[str, str, str, int]] = []
    others: Counter[str] = Counter()
    while queue:
        label, below = queue.popleft()
        if (identity := _identity(folder / below)) in visited:
            continue
        visited.add(identity)
        with os.scandir(folder / below) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind == "folder":
                    add = queue.append if entry.is_symlink() else queue.appendleft
                    add((label, os.path.join(below, entry.name)))
                elif kind == "file" and entry.name.lower().endswith(IMG_EXTENSIONS):
                    found.append((classes[label] if classes else "", below, entry.name, label))
                else:
                    extension = os.path.splitext(entry.name)[1].lower() or "no extension"
                    others[extension if kind == "file" else kind] += 1
    found.sort()
    return [os.path.join(below, name) for _, below, name, _ in found], [row[-1] for row in found], others


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "no regular file"
    except OSError:  # a link to itself
        return "no regular file"


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

"""Any tree of image files with one folder for each class."""

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from scclr.config.errors import UserError, require
from scclr.datasets import CLASS_FOLDERS_ADVICE, ImageSet, Parts, Source
from scclr.datasets.cache import cached
from scclr.datasets.files import Files, OnDisk
from scclr.datasets.listing import class_folders, list_images
from scclr.datasets.reading import reading
from scclr.run.machine import available_cores, memory_limit
from scclr.run.torchrun import group

MOST_WORKERS = 16  # of one process, where dataset.workers leaves their number open
MOST_PIXELS = 10_000  # on a side: an image of three bytes a pixel takes 300 MB


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """``<root>/<class>/*.jpg``, or ``<root>/train/<class>/*`` with ``<root>/test`` or ``<root>/val`` beside it.

    An image is decoded to RGB and turned upright, its shorter side resized to ``resize`` (antialiased) and its center
    cropped. In a tree without a test folder, ``test`` sets the share that is set apart.

    Args:
        image_size: side of the images and of their views.
        resize: the shorter side before the center crop; null is ``image_size``.
        in_memory: decode all images once and hold them as uint8; random crops are then taken from the squares. If
            false, files are decoded whenever a batch needs them and random crops are taken from the whole image.
        cache: folder in which to keep all images of the tree as squares of ``resize`` pixels. Random crops are then
            taken from these. A tree with another digest gets another cache.
        on_corrupt: ``refuse`` a file that cannot be decoded, or ``skip`` it.
        workers: number of processes that read; null is one for each core, shared among the processes of a node. It does
            not change the identity of a run.

    Raises:
        ValueError: a size or a number out of range, ``resize`` below ``image_size``, or another ``on_corrupt``.
    """

    root: str
    image_size: int
    resize: int | None = None
    in_memory: bool = True
    cache: str | None = None
    on_corrupt: str = "refuse"
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.image_size <= MOST_PIXELS:
            raise ValueError(f"image_size={self.image_size}: give a number of pixels from 1 to {MOST_PIXELS}")
        if self.resize is not None and not self.image_size <= self.resize <= MOST_PIXELS:
            advice = f"give at least image_size={self.image_size} and at most {MOST_PIXELS}"
            raise ValueError(f"resize={self.resize}: {advice}")
        if self.on_corrupt not in ("refuse", "skip"):
            raise ValueError(f"on_corrupt={self.on_corrupt}: choose refuse or skip")
        if self.workers is not None and not 0 <= self.workers <= 1000:
            raise ValueError(f"workers={self.workers}: give a number of processes, or 0 to read in this one")

    def read(self) -> Parts:
        root = Path(self.root)
        require(os.path.isdir(root), f"{root}: no such folder; {CLASS_FOLDERS_ADVICE}")
        folders = [root / name for name in ("train", "test", "val") if os.path.isdir(root / name)]
        if root / "train" not in folders:
            folders = [root]
        if self.cache is not None:
            inside = [folder for folder in folders if Path(self.cache).resolve().is_relative_to(folder.resolve())]
            require(
                not inside, f"dataset.cache={self.cache} would be one of the class folders: give a folder elsewhere"
            )
        train, classes = self.tree(folders[0])
        if len(folders) == 1:
            return Parts(train, None, classes)
        test, test_classes = self.tree(folders[1])
        require(test_classes == classes, f"{folders[1]}: its class folders are not those of {folders[0]}")
        return Parts(train, test, classes)

    def digest(self) -> str:
        """A hash of the part, the path below the part's folder, the size in bytes and the class of every image file.

        Two copies of a tree have the same digest. A file that is replaced by another one of the same size is not
        noticed.
        """
        if self.published:
            return ""
        parts, rows = self.read(), []
        for part, data in (("train", parts.train), ("test", parts.test), ("validation", parts.validation)):
            if data is None:
                continue
            assert isinstance(data.images, Files)
            root, names = data.images.root, data.images.names.tolist()
            with reading(root, CLASS_FOLDERS_ADVICE):
                for name, label in zip(names, data.labels.tolist(), strict=True):
                    size = os.stat(os.path.join(os.fsencode(root), name)).st_size
                    rows.append((part.encode(), name, b"%d" % size, os.fsencode(parts.classes[label])))
        content = b"".join(field + b"\0" for row in sorted(rows) for field in row)
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def streamed(self) -> bool:
        return not self.in_memory and self.cache is None

    @cached_property
    def _content(self) -> str:
        return self.digest()  # once for all splits

    def materialize(self, data: ImageSet) -> ImageSet:
        if self.cache is not None and isinstance(data.images, Files):
            mapped, readable = cached(data.images, Path(self.cache), self._content)
            data = ImageSet(mapped, data.labels[readable])
        if not (self.in_memory and isinstance(data.images, OnDisk)):
            return data
        size, limit = math.prod(data.images.shape), memory_limit()
        need = f"{len(data):,} images of {self.image_size} x {self.image_size} pixels take {size / 2**30:,.1f} GiB"
        advice = "type dataset.in_memory=false or a smaller dataset.image_size"
        require(size < limit, f"{need} of {limit / 2**30:,.1f} GiB of memory: {advice}")
        images, readable = torch.empty(data.images.shape, dtype=torch.uint8), torch.ones(len(data), dtype=torch.bool)
        start = 0
        for part, mask in data.images.iterate(replace_broken=False):
            block = slice(start, start := start + len(part))
            images[block], readable[block] = part, mask
        return ImageSet(images, data.labels) if readable.all() else ImageSet(images, data.labels)[readable]

    def tree(
        self,
        folder: Path,
        classes: list[str] | None = None,
        *,
        wanted: int | None = None,
        advice: str = CLASS_FOLDERS_ADVICE,
    ) -> tuple[ImageSet, list[str]]:
        """The image files in the folders ``classes`` of ``folder``, or in all of its folders, and these classes.

        Files of other kinds are counted on stderr, unless the dataset is a published one.

        Raises:
            UserError: a folder is missing or empty, or there are not as many images as ``wanted``.
        """
        with reading(folder, advice):
            classes = classes or class_folders(folder)
            missing = [name for name in classes if not os.path.isdir(folder / name)]
            require(not missing, f"{folder}: {len(missing)} class folders are missing, such as {missing[:1]}; {advice}")
            names, labels, others = list_images(folder, classes)
        if wanted is not None and len(names) != wanted:
            count = f"{folder}: {len(names):,} images instead of {wanted:,}"
            raise UserError(f"{count}; unpack it anew, or type dataset=imagefolder for any tree")
        require(bool(classes), f"{folder}: no class folders; {advice}")
        empty = [classes[label] for label in sorted({*range(len(classes))} - {*labels})]
        what = f"{len(empty)} class folders have no images of their own, such as {empty[:1]}"
        require(not empty, f"{folder}: {what}; take them out, or {advice}")
        if others and not self.published:
            kinds = ", ".join(f"{kind} {n:,}" for kind, n in others.most_common(5))
            _say_once(f"{folder}: {others.total():,} files of other kinds are left out ({kinds})")
        return self.image_set(folder, names, torch.tensor(labels)), classes

    def image_set(self, folder: Path, names: Sequence[str], labels: Tensor) -> ImageSet:
        """The files ``names`` below ``folder``."""
        files = Files(
            index=torch.arange(len(names)),
            size=self.image_size,
            workers=default_workers() if self.workers is None else self.workers,
            root=folder,
            names=np.array([os.fsencode(name) for name in names]),
            labels=labels,
            resize=self.resize or self.image_size,
            skip=self.on_corrupt == "skip",
        )
        return ImageSet(files, labels)


def default_workers() -> int:
    """This process's share of the cores, among the processes that torchrun started on the node."""
    return min(max(1, available_cores() // group().local_size), MOST_WORKERS)


def refuse_outside(source: Path, names: Sequence[str], advice: str) -> None:
    """Raise ``UserError`` if a path in the list ``source`` leaves the folder that it starts from."""
    outside = [n for n in names if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    require(not outside, f"{source}: {outside[:1]} lies outside its folder; {advice}")


@lru_cache
def _say_once(line: str) -> None:
    """Print to stderr, once on a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)

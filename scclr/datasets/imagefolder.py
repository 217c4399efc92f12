"""Any tree of image files: with one folder for each class, or without labels."""

import hashlib
import math
import os
import sys
from collections import Counter
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
from scclr.datasets.workers import start_server
from scclr.run.machine import memory_limit, own_cores

MOST_WORKERS = 16  # of one process, where dataset.workers leaves their number open
MOST_PIXELS = 10_000  # on a side: an image of three bytes a pixel takes 300 MB


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """``<root>/<class>/*.jpg``, or ``<root>/train/<class>/*`` with ``<root>/test`` or ``<root>/val`` beside it.

    An image is decoded to RGB and turned upright, its shorter side resized to ``resize`` (antialiased) and its center
    cropped. In a tree without a test folder, ``test`` sets the share that is set apart.

    Args:
        labels: ``folders``: the folder of an image says its class. null: the images have no labels, and all that lie
            below ``root`` are taken.
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
        ValueError: a size or a number out of range, ``resize`` below ``image_size``, or another ``labels`` or
            ``on_corrupt``.
    """

    root: str
    labels: str | None = "folders"
    image_size: int
    resize: int | None = None
    in_memory: bool = True
    cache: str | None = None
    on_corrupt: str = "refuse"
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.image_size, self.resize, self.workers)
        if self.labels not in (("folders",) if self.published else ("folders", None)):
            advice = "choose folders" + ("" if self.published else ", or null for images without labels")
            raise ValueError(f"labels={self.labels}: {advice}")
        if self.on_corrupt not in ("refuse", "skip"):
            raise ValueError(f"on_corrupt={self.on_corrupt}: choose refuse or skip")

    def read(self) -> Parts:
        root = Path(self.root)
        require(os.path.isdir(root), f"{root}: no such folder; {CLASS_FOLDERS_ADVICE}")
        if self.labels is None:
            return Parts(self.flat(root), None, [])
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
                    kind = os.fsencode(parts.classes[label]) if parts.classes else b""
                    rows.append((part.encode(), name, b"%d" % size, kind))
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
        if self.in_memory:
            return read_all(data)
        if data.images.workers > 0:  # type: ignore[union-attr]
            start_server()  # it imports while the model is built
        return data

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
        flat = "" if self.published else "; images without labels: dataset.labels=null"
        require(bool(classes), f"{folder}: no class folders; {advice}{flat}")
        empty = [classes[label] for label in sorted({*range(len(classes))} - {*labels})]
        what = f"{len(empty)} class folders have no images of their own, such as {empty[:1]}"
        require(not empty, f"{folder}: {what}; take them out, or {advice}")
        if not self.published:
            say_left_out(folder, others)
        return self.image_set(folder, names, torch.tensor(labels)), classes

    def flat(self, folder: Path) -> ImageSet:
        """All image files below ``folder``, without labels.

        Raises:
            UserError: there are none, or a folder cannot be read.
        """
        with reading(folder, "give dataset.root=<a folder of images>"):
            names, labels, others = list_images(folder, None)
        require(bool(names), f"{folder}: no images in this folder or below; give dataset.root=<a folder of images>")
        say_left_out(folder, others)
        return self.image_set(folder, names, torch.tensor(labels))

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


def check_sizes(image_size: int, resize: int | None, workers: int | None) -> None:
    """Raise ``ValueError`` for a side in pixels or a number of processes that is out of range."""
    if not 1 <= image_size <= MOST_PIXELS:
        raise ValueError(f"image_size={image_size}: give a number of pixels from 1 to {MOST_PIXELS}")
    if resize is not None and not image_size <= resize <= MOST_PIXELS:
        raise ValueError(f"resize={resize}: give at least image_size={image_size} and at most {MOST_PIXELS}")
    if workers is not None and not 0 <= workers <= 1000:
        raise ValueError(f"workers={workers}: give a number of processes, or 0 to read in this one")


def default_workers() -> int:
    """This process's share of the cores, up to a limit."""
    return min(own_cores(), MOST_WORKERS)


def read_all(data: ImageSet) -> ImageSet:
    """The images of ``data``, which lie on disk, in memory; broken files that may be skipped are left out.

    Raises:
        UserError: there is too little memory, or a file cannot be read.
    """
    if not isinstance(data.images, OnDisk):
        return data
    size, limit, side = math.prod(data.images.shape), memory_limit(), data.images.size
    need = f"{len(data):,} images of {side} x {side} pixels take {size / 2**30:,.1f} GiB"
    advice = "type dataset.in_memory=false or a smaller dataset.image_size"
    require(size < limit, f"{need} of {limit / 2**30:,.1f} GiB of memory: {advice}")
    images, readable = torch.empty(data.images.shape, dtype=torch.uint8), torch.ones(len(data), dtype=torch.bool)
    start = 0
    for part, mask in data.images.iterate(replace_broken=False):
        block = slice(start, start := start + len(part))
        images[block], readable[block] = part, mask
    return ImageSet(images, data.labels) if readable.all() else ImageSet(images, data.labels)[readable]


def say_left_out(folder: Path, others: Counter[str]) -> None:
    """Say how many files of other kinds there are, if there are any."""
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in others.most_common(5))
    if others:
        _say_once(f"{folder}: {others.total():,} files of other kinds are left out ({kinds})")


def refuse_outside(source: Path, names: Sequence[str], advice: str) -> None:
    """Raise ``UserError`` if a path in the list ``source`` leaves the folder that it starts from."""
    outside = [n for n in names if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
    require(not outside, f"{source}: {outside[:1]} lies outside its folder; {advice}")


@lru_cache
def _say_once(line: str) -> None:
    """Print to stderr, once on a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)

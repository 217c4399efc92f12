"""Any tree of image files with one folder per class."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from scclr.config import require
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.cache import cached
from scclr.datasets.files import Files, OnDisk
from scclr.datasets.reading import reading

ADVICE = "give dataset.root=<a folder with one folder of images per class>"
MOST_WORKERS = 16  # of one process, where dataset.workers leaves their number open


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """``<root>/<class>/*.jpg``, or ``<root>/train/<class>/*`` with ``<root>/test`` or ``<root>/val`` beside it.

    An image is decoded to RGB, its shorter side resized to ``resize`` (antialiased) and its centre cropped. In a tree
    without a test folder, ``test`` sets the share that is carved.

    Args:
        image_size: side of the images, and of their views.
        resize: the shorter side before the centre crop; null is ``image_size``.
        in_memory: decode all once and hold them as uint8; random crops are then taken from the squares. If false, files
            are decoded whenever a batch needs them and random crops are taken from the whole image.
        cache: folder in which to keep the squares, of ``resize`` pixels and of all files, whatever part is used; random
            crops are taken from these.
        on_corrupt: ``refuse`` a file that cannot be decoded, or ``skip`` it.
        workers: processes that read; null is one per core, shared among the processes of a node. Not in the run's name.

    Raises:
        ValueError: a size below 1, ``resize`` below ``image_size``, or another ``on_corrupt``.
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
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: give a number of pixels")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize={self.resize}: give at least image_size={self.image_size}")
        if self.on_corrupt not in ("refuse", "skip"):
            raise ValueError(f"on_corrupt={self.on_corrupt}: choose refuse or skip")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers}: give a number of processes, or 0 to read in this one")

    def read(self) -> Parts:
        root = Path(self.root)
        require(root.is_dir(), f"{root}: no such folder; give dataset.root=<a folder with one folder per class>")
        if not (root / "train").is_dir():
            full, classes = self.tree(root)
            return Parts(full, None, classes)
        train, classes = self.tree(root / "train")
        for name in ("test", "val"):
            if (root / name).is_dir():
                test, test_classes = self.tree(root / name)
                require(test_classes == classes, f"{root / name}: its class folders are not those of {root / 'train'}")
                return Parts(train, test, classes)
        return Parts(train, None, classes)

    def settle(self, data: ImageSet) -> ImageSet:
        if not (self.in_memory and isinstance(data.images, OnDisk)):
            return data
        images, there = torch.empty(data.images.shape, dtype=torch.uint8), torch.ones(len(data), dtype=torch.bool)
        first = 0
        for part, good in data.images.squares():
            block = slice(first, first := first + len(part))
            images[block], there[block] = part, good
        return ImageSet(images, data.labels) if there.all() else ImageSet(images, data.labels)[there]

    def tree(
        self, folder: Path, classes: list[str] | None = None, *, wanted: int | None = None, advice: str = ADVICE
    ) -> tuple[ImageSet, list[str]]:
        """The image files in the folders ``classes`` of ``folder``, or in all of its folders, and these classes.

        Raises:
            UserError: a folder is missing or empty, or there are not as many images as ``wanted``.
        """
        with reading(folder, advice):
            classes = classes or find_classes(str(folder))[0]
            missing = [name for name in classes if not (folder / name).is_dir()]
            require(not missing, f"{folder}: {len(missing)} class folders are missing, such as {missing[:1]}; {advice}")
            samples = make_dataset(str(folder), {name: c for c, name in enumerate(classes)}, IMG_EXTENSIONS)
        count = f"{folder}: {len(samples):,} images instead of {wanted or 0:,}"
        require(wanted in (None, len(samples)), f"{count}; unpack it anew, or type dataset=imagefolder for any tree")
        names = [os.path.relpath(path, folder) for path, _ in samples]
        return self.image_set(folder, names, torch.tensor([c for _, c in samples])), classes

    def image_set(self, folder: Path, names: Sequence[str], labels: Tensor) -> ImageSet:
        """The files ``names`` below ``folder``, or their cache."""
        files = Files(
            index=torch.arange(len(names)),
            size=self.image_size,
            workers=min(_cores(), MOST_WORKERS) if self.workers is None else self.workers,
            root=folder,
            names=np.array([os.fsencode(name) for name in names]),
            classes=labels,
            resize=self.resize or self.image_size,
            skip=self.on_corrupt == "skip",
        )
        if self.cache is None:
            return ImageSet(files, labels)
        mapped, which = cached(files, Path(self.cache))
        return ImageSet(mapped, labels[which])


def _cores() -> int:
    """Of this process, shared with the others that torchrun started on the node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

"""Images that stay on disk.

Dimensions: N images, n of them in a block, V views, S pixels a side of what is returned.
"""

import errno
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from scclr.config.errors import UserError, one_line
from scclr.datasets.decode import UNREADABLE, center_crop, crops, upright_size
from scclr.datasets.workers import read_ahead

IMAGES_PER_JOB = 64  # that a worker reads at once: 64 x 2 views of 224 x 224 are 19 MB
BROKEN_FILE_ADVICE = "replace or delete this file, or type dataset.on_corrupt=skip"

Boxes = Callable[[Tensor | int, Tensor | int], Tensor]  # (heights, widths) -> [n, V, 4] top, left, height, width


class Problem(NamedTuple):
    """Why the file of a block's ``row`` could not be read; ``broken`` unless the disk or the network is to blame."""

    row: int
    path: str
    text: str
    broken: bool


class Block(NamedTuple):
    """``images`` uint8 [n, ...] and what went wrong with the files of some."""

    images: Tensor
    problems: list[Problem]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDisk(ABC):
    """N color images on disk, indexed like the tensor that holds them, uint8 [N, 3, S, S]; indexing reads nothing."""

    index: Tensor  # [N], among all images that the files hold
    size: int
    workers: int

    @abstractmethod
    def read_center(self, rows: Tensor, *, replace_broken: bool = True) -> Block:
        """Whole images, cropped to their center: [n, 3, S, S].

        Args:
            replace_broken: show another image for a broken file, if such files are skipped; else a black one.
        """

    @abstractmethod
    def read_crops(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        """What a training step takes: views [n, V, 3, side, side], or whole images [n, 3, R, R] to cut them from."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.index), 3, self.size, self.size])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return replace(self, index=self.index[index.cpu() if isinstance(index, Tensor) else index])

    def checked_images(self, block: Block) -> Tensor:
        """The images of a block that ``read_center`` or ``read_crops`` made, in this process or in a worker.

        Raises:
            UserError: a file could not be read.
        """
        return block.images

    def iterate(
        self, size: int = IMAGES_PER_JOB, *, replace_broken: bool = True, pin: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, at most ``size`` at once: (uint8 [n, 3, S, S], bool [n]: which files are readable).

        Args:
            replace_broken: as in ``read_center``; without it a progress bar is shown.
            pin: copy to page-locked memory.

        Raises:
            UserError: as ``checked_images``.
        """
        size = min(size, 4 * IMAGES_PER_JOB)  # every worker holds two blocks
        if len(self) == 0:
            yield torch.empty(self.shape, dtype=torch.uint8), torch.ones(0, dtype=torch.bool)
        starts = range(0, len(self), size)
        job = partial(self._read_block, size=size, replace_broken=replace_broken)
        blocks = read_ahead(job, starts, self.workers, pin)
        for block in tqdm(blocks, "reading images", len(starts), disable=True if replace_broken else None):
            readable = torch.ones(len(block.images), dtype=torch.bool)
            readable[[problem.row for problem in block.problems]] = False
            yield self.checked_images(block), readable

    def _read_block(self, first: int, *, size: int, replace_broken: bool) -> Block:
        return self.read_center(torch.arange(first, min(first + size, len(self))), replace_broken=replace_broken)


@dataclass(frozen=True, kw_only=True, eq=False)
class Files(OnDisk):
    """Image files of any size, decoded whenever they are asked for.

    Whole images have their shorter side resized to ``resize`` (antialiased) and the center cropped. With ``skip``, a
    broken file is replaced by the next readable one of its class, in the order of the files: what a step sees remains a
    function of (files, seed, step), and its labels remain right. Each broken file is named once, on stderr.
    """

    root: Path
    names: np.ndarray  # bytes, below root: a list of a million strings would be copied into every worker
    labels: Tensor  # of all files
    resize: int
    skip: bool
    broken: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to the workers, which share one copy of tensors: the names of ImageNet take 38 MB."""
        return {**vars(self), "names": self._names_tensor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state["names"].numpy()  # [N, bytes of the longest name]
        vars(self).update(state, names=names.view(f"S{names.shape[1]}").squeeze(1), _names_tensor=state["names"])

    @cached_property
    def _names_tensor(self) -> Tensor:
        return torch.from_numpy(self.names.reshape(-1, 1).view(np.uint8))

    def read_center(self, rows: Tensor, *, replace_broken: bool = True) -> Block:
        return self._decode(rows, lambda _, image: center_crop(image, self.resize, self.size), replace_broken)

    def read_crops(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        # All boxes are drawn at once, from the sizes in the headers: image by image, a job would take 15 % longer.
        sizes = [self._size(row) for row in rows.tolist()]
        own_boxes = boxes(*torch.tensor(sizes).unbind(1))  # [n, V, 4]

        def cut(i: int, image: Image.Image) -> Tensor:
            size = upright_size(image)  # another one if the image replaces a broken file
            return crops(image, (own_boxes if size == sizes[i] else boxes(*size))[i], side)

        return self._decode(rows, cut)

    def checked_images(self, block: Block) -> Tensor:
        for problem in block.problems:
            if not (self.skip and problem.broken):
                advice = f"; {BROKEN_FILE_ADVICE}" if problem.broken else ""
                raise UserError(f"{problem.path}: {problem.text}{advice}")
            if problem.path not in self.broken:
                self.broken.add(problem.path)
                print(f"corrupt image {len(self.broken)}: {problem.path}: {problem.text}", file=sys.stderr)
        return block.images

    def _decode(self, rows: Tensor, pixels: Callable[[int, Image.Image], Tensor], replace_broken: bool = True) -> Block:
        """``pixels(i, image)`` of the image in ``rows[i]``, for all of them; black for what cannot be read."""
        replacing = self.skip and replace_broken
        images: dict[int, Tensor] = {}
        problems = []
        for i, row in enumerate(rows.tolist()):
            for candidate in self._candidates(row) if replacing else [row]:
                path = self._path(candidate)
                shown = printable(path)
                try:
                    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
                        images[i] = pixels(i, image)
                    break
                except UNREADABLE as error:
                    broken = not isinstance(error, OSError) or error.errno in (None, errno.ENOENT)
                    text = one_line(error).removesuffix(repr(path)).rstrip(": .") or type(error).__name__
                    advice = "" if broken else "; check the disk or the network, and type the command again"
                    problems.append(Problem(i, shown, f"{text}{advice}", broken))
            else:
                if replacing:
                    text = "no readable image of its class is left; replace the broken files"
                    problems.append(Problem(i, shown, text, False))
        black = torch.zeros_like(next(iter(images.values()), torch.empty(3, self.size, self.size, dtype=torch.uint8)))
        return Block(torch.stack([images.get(i, black) for i in range(len(rows))]), problems)

    def _candidates(self, row: int) -> Iterator[int]:
        """``row``; then the others of its class, from the next file on and round to the first."""
        yield row
        labels = self.labels[self.index]
        same = (labels == labels[row]).nonzero().squeeze(1)
        distance = (self.index[same] - self.index[row]) % len(self.names)
        yield from same[distance.argsort()][1:].tolist()

    def _size(self, row: int) -> tuple[int, int]:
        """(height, width), from the header; (1, 1) of a broken file."""
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(self._path(row)) as image:
                return upright_size(image)
        except UNREADABLE:
            return 1, 1

    def _path(self, row: int) -> str:
        return str(self.root / os.fsdecode(bytes(self.names[self.index[row]])))


def printable(path: str) -> str:
    """``path`` in one line of UTF-8, with escapes for line breaks and for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)

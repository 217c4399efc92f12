"""Images that stay on disk, and the worker processes that read them before they are needed.

Dimensions: N images, n of them in a block, V views, S pixels a side of what is returned.
"""

import ctypes
import errno
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scclr.config import UserError, one_line
from scclr.datasets.decode import UNREADABLE, centre, crops

BLOCK = 64  # images that a worker reads at once: 64 x 2 views of 224 x 224 are 19 MB
ADVICE = "replace or delete this file, or type dataset.on_corrupt=skip"

T = TypeVar("T")
Boxes = Callable[[Tensor | int, Tensor | int], Tensor]  # (heights, widths) -> [n, V, 4] top, left, height, width


class Problem(NamedTuple):
    """A file that could not be read; ``broken`` if that is the file's fault and not the disk's or the network's."""

    place: int
    path: str
    text: str
    broken: bool


class Block(NamedTuple):
    """``images`` uint8 [n, ...] and what went wrong with the files of some."""

    images: Tensor
    problems: list[Problem]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDisk(ABC):
    """N colour images on disk, indexed like the tensor that holds them, uint8 [N, 3, S, S]; indexing reads nothing."""

    index: Tensor  # [N], of all that the files hold
    size: int
    workers: int

    @abstractmethod
    def read(self, rows: Tensor) -> Block:
        """Whole images [n, 3, S, S]."""

    @abstractmethod
    def fetch(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        """What a step takes of them: [n, V, 3, side, side] views, or whole images [n, 3, R, R]."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.index), 3, self.size, self.size])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return replace(self, index=self.index[index.cpu() if isinstance(index, Tensor) else index])

    def accept(self, block: Block) -> Tensor:
        """The images of a block that ``read`` or ``fetch`` made, here or in a worker.

        Raises:
            UserError: a file could not be read.
        """
        return block.images

    def read_once(self, rows: Tensor) -> Block:
        """As ``read``, but with blanks for broken files."""
        return self.read(rows)

    def squares(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order: (some [n, 3, S, S], bool [n]: whether the image is there)."""
        job, starts = _Read(self.read_once, len(self), BLOCK), range(0, len(self), BLOCK)
        for block in tqdm(read_ahead(job, starts, self.workers), "reading images", len(starts), disable=None):
            good = torch.ones(len(block.images), dtype=torch.bool)
            good[[problem.place for problem in block.problems]] = False
            yield self.accept(block), good

    def blocks(self, size: int, pin: bool = False) -> Iterator[Tensor]:
        """All images in order, uint8, at most ``size`` at once."""
        size = min(size, 4 * BLOCK)  # every worker has two of them under way
        if len(self) == 0:
            yield torch.empty(self.shape, dtype=torch.uint8)
        for block in read_ahead(_Read(self.read, len(self), size), range(0, len(self), size), self.workers, pin):
            yield self.accept(block)


@dataclass(frozen=True)
class _Read:
    """Blocks of consecutive rows, by their first one."""

    read: Callable[[Tensor], Block]
    rows: int
    size: int

    def __call__(self, first: int) -> Block:
        return self.read(torch.arange(first, min(first + self.size, self.rows)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Files(OnDisk):
    """Image files of any size, decoded whenever they are asked for.

    Whole images have their shorter side resized to ``resize`` (antialiased) and the centre cropped. With ``skip``, the
    place of a broken file goes to the next readable one of its class, in the order of the files: what a step sees
    remains a function of (files, seed, step), and its labels remain right. Each is named once, on stderr.
    """

    root: Path
    names: np.ndarray  # bytes, below root: a list of a million strings would be copied into every worker
    classes: Tensor  # [all]
    resize: int
    skip: bool
    broken: set[str] = field(default_factory=set)

    def read(self, rows: Tensor) -> Block:
        return self._decode(rows, lambda _, image: centre(image, self.resize, self.size))

    def fetch(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        sizes = torch.tensor([self._size(row) for row in rows.tolist()])  # [n, 2]
        cut = boxes(*sizes.unbind(1))

        def use(place: int, image: Image.Image) -> Tensor:
            expected = sizes[place].tolist() == [image.height, image.width]  # not if it replaces another
            return crops(image, (cut if expected else boxes(image.height, image.width))[place], side)

        return self._decode(rows, use)

    def accept(self, block: Block) -> Tensor:
        for problem in block.problems:
            if not (self.skip and problem.broken):
                raise UserError(f"{problem.path}: {problem.text}; {ADVICE}")
            if problem.path not in self.broken:
                self.broken.add(problem.path)
                print(f"corrupt image {len(self.broken)}: {problem.path}: {problem.text}", file=sys.stderr)
        return block.images

    def read_once(self, rows: Tensor) -> Block:
        return self._decode(rows, lambda _, image: centre(image, self.resize, self.size), replacing=False)

    def _decode(self, rows: Tensor, use: Callable[[int, Image.Image], Tensor], replacing: bool = True) -> Block:
        images: list[Tensor | None] = [None] * len(rows)
        problems = []
        for place, row in enumerate(rows.tolist()):
            for candidate in self._candidates(row) if self.skip and replacing else [row]:
                path = self._path(candidate)
                try:
                    with Image.open(path) as image:
                        images[place] = use(place, image)
                    break
                except UNREADABLE as error:
                    broken = not isinstance(error, OSError) or error.errno in (None, errno.ENOENT)
                    text = one_line(error).removesuffix(f" {path!r}") or type(error).__name__
                    problems.append(Problem(place, path, text, broken))
            else:
                if self.skip and replacing:
                    problems.append(Problem(place, path, "no readable image of its class is left", False))
        blank = next((image for image in images if image is not None), torch.zeros(3, self.size, self.size))
        blank = torch.zeros_like(blank, dtype=torch.uint8)
        return Block(torch.stack([blank if image is None else image for image in images]), problems)

    def _candidates(self, row: int) -> Iterator[int]:
        """``row``; then the others of its class, from the next file on and round to the first."""
        yield row
        classes = self.classes[self.index]
        same = (classes == classes[row]).nonzero().squeeze(1)
        distance = (self.index[same] - self.index[row]) % len(self.names)
        yield from same[distance.argsort()][1:].tolist()

    def _size(self, row: int) -> tuple[int, int]:
        """(height, width), from the header; (1, 1) of a broken file."""
        try:
            with Image.open(self._path(row)) as image:
                return image.height, image.width
        except UNREADABLE:
            return 1, 1

    def _path(self, row: int) -> str:
        return str(self.root / os.fsdecode(bytes(self.names[self.index[row]])))


def read_ahead(job: Callable[[int], T], keys: Sequence[int], workers: int, pin: bool = False) -> Iterator[T]:
    """``job(key)`` for all ``keys`` in order, made by as many worker processes ahead of their use (0: in this one).

    Raises:
        UserError: a worker was killed.
    """
    workers = min(workers, len(keys) - 1)  # one job gains nothing from a process of its own
    # Forked in a moment, also where the process itself was spawned; they never touch CUDA.
    context = "fork" if workers > 0 and sys.platform == "linux" else None
    loader = DataLoader(
        _Jobs(job),
        batch_size=None,
        sampler=keys,
        num_workers=max(0, workers),
        pin_memory=pin,
        multiprocessing_context=context,
        worker_init_fn=_die_with_parent,
        generator=torch.Generator(),  # the default draws from the global one
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        advice = "type a smaller dataset.workers, or give more shared memory (docker run --shm-size=8g)"
        raise UserError(f"{one_line(error)}; {advice}") from error


def _die_with_parent(worker: int) -> None:
    """A worker left over by a killed process would hold that one's locks, until PyTorch notices after 5 seconds."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Jobs(Dataset[T]):
    def __init__(self, job: Callable[[int], T]) -> None:
        self.job = job

    def __getitem__(self, key: int) -> T:
        return self.job(key)

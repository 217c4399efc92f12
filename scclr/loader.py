"""What each step of pretraining reads: a keyed order of the images, and this process's share of a batch.

Dimensions: N images, G of them a step, B of these in this process, V views of each, C channels, S pixels a side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.augment import Augment, generator
from scclr.config import require
from scclr.datasets import ImageSet
from scclr.datasets.files import BLOCK, Block, Files, OnDisk, read_ahead


class Batch(NamedTuple):
    """A step's images, of this process, and labels, of all."""

    images: Tensor  # uint8 [B, C, H, W], or crops that were cut while reading [B, V, C, S, S]
    labels: Tensor  # [G]


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of ``n`` images in an epoch, int64 [n]: a pure function of its arguments."""
    return torch.randperm(n, generator=generator(seed, epoch, stream=0))


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> Tensor:
    """Which of ``n`` images ``step`` sees, int64 [G]."""
    epoch, position = divmod(step, n // batch_size)
    return epoch_order(seed, epoch, n)[position * batch_size : (position + 1) * batch_size]


def batches(
    data: ImageSet, augment: Augment, *, seed: int, batch_size: int, steps: range, rank: int = 0, size: int = 1
) -> Iterator[Batch]:
    """The batches of ``steps``, for the process ``rank`` of ``size``, on the device of the labels.

    Images in memory are indexed there. Those on disk are read ahead by worker processes, only this process's share, and
    files are cut to their views at once, each decoded a single time. A batch is a function of (data, seed, step)
    whatever the first step and the number of workers and of processes.

    Raises:
        UserError: a file that cannot be read.
    """
    device, n, share = data.labels.device, len(data), batch_size // size
    own, order = slice(rank * share, (rank + 1) * share), None
    if isinstance(data.images, OnDisk):
        job = _Share(data.images, suited(augment, data.images), seed, batch_size, own.start, share)
        keys = range(steps.start * job.blocks, steps.stop * job.blocks)
        stream: Iterator[Block] = read_ahead(job, keys, data.images.workers, pin=device.type == "cuda")
    for step in steps:
        epoch, position = divmod(step, n // batch_size)
        if order is None or position == 0:
            order = epoch_order(seed, epoch, n).to(device, non_blocking=True)
        rows = order[position * batch_size : (position + 1) * batch_size]
        if isinstance(data.images, OnDisk):
            parts = [data.images.accept(block) for block in islice(stream, job.blocks)]
            images = torch.cat([part.to(device, non_blocking=True) for part in parts])
        else:
            images = data.images.index_select(0, rows[own])
        yield Batch(images, data.labels[rows])


def suited(augment: Augment, images: Tensor | OnDisk) -> Augment:
    """``augment`` with views of the size of ``images``, where it sets none: a cache may hold larger squares.

    Raises:
        UserError: a rotation, which comes before the crop, of files whose crops are cut while reading.
    """
    rotation = max(recipe.rotation for recipe in augment.recipes)
    advice = "type augment.rotation=0, or give dataset.cache=<folder> or dataset.in_memory=true"
    cut = isinstance(images, Files) and rotation > 0
    require(not cut, f"augment.rotation={rotation:g} needs whole images, not files: {advice}")
    return replace(augment, size=augment.size or images.shape[-1])


def views(data: ImageSet, augment: Augment, *, seed: int, step: int) -> Tensor:
    """The views [V N, C, S, S] that ``step`` would have, if it saw just ``data``."""
    augment = suited(augment, data.images)
    if isinstance(data.images, OnDisk):
        job = _Share(data.images, augment, seed, len(data), 0, len(data))
        images = data.images.accept(job.read(torch.arange(len(data)), step, slice(0, len(data))))
    else:
        images = data.images
    return augment(images, seed=seed, step=step)


@dataclass(frozen=True)
class _Share:
    """What a worker reads: a block of this process's share of a step, by its number since the first step."""

    images: OnDisk
    augment: Augment
    seed: int
    batch_size: int
    first: int
    share: int

    @property
    def blocks(self) -> int:
        return -(-self.share // BLOCK)

    def __call__(self, key: int) -> Block:
        step, block = divmod(key, self.blocks)
        part = slice(self.first + block * BLOCK, self.first + min((block + 1) * BLOCK, self.share))
        return self.read(batch_indices(self.seed, step, len(self.images), self.batch_size)[part], step, part)

    def read(self, rows: Tensor, step: int, part: slice) -> Block:
        """Images ``rows``, which are a ``part`` of the batch of ``step``."""
        views = len(self.augment.views)
        draws = self.augment.draw(self.batch_size, seed=self.seed, step=step).of(views, part)

        def boxes(height: Tensor | int, width: Tensor | int) -> Tensor:
            sizes = (side.repeat(views) if isinstance(side, Tensor) else side for side in (height, width))
            return draws.boxes(*sizes).unflatten(0, (views, -1)).transpose(0, 1)  # [B, V, 4]

        assert self.augment.size is not None
        return self.images.fetch(rows, boxes, self.augment.size)

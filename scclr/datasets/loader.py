"""What each step of pretraining reads: an order of the images that depends on the seed, and a process's share of it.

Dimensions: N images, G of them in a step, B of these in this process, V views of each, C channels, S pixels a side.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.augment import ORDER_STREAM, Augment, generator
from scclr.config.errors import require
from scclr.datasets import ImageSet
from scclr.datasets.files import IMAGES_PER_JOB, Block, Files, OnDisk
from scclr.datasets.workers import read_ahead
from scclr.run.machine import own_cores

SETTLING_STEPS = 20  # in which workers start and caches fill
JUDGED_STEPS, JUDGED_SECONDS = 30, 20.0  # the least time over which waiting is judged
MOST_WAITING = 0.05  # of the time, without a word about it


class Batch(NamedTuple):
    """The images of a step in this process, and the labels of the step in all processes."""

    images: Tensor  # uint8 [B, C, H, W], or crops that were cut while reading [B, V, C, S, S]
    labels: Tensor  # [G]


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of ``n`` images in an epoch, int64 [n]: a pure function of its arguments."""
    return torch.randperm(n, generator=generator(seed, epoch, stream=ORDER_STREAM))


def batch_indices(seed: int, step: int, n: int, batch_size: int) -> Tensor:
    """Which of ``n`` images ``step`` sees, int64 [G]."""
    epoch, position = divmod(step, n // batch_size)
    return epoch_order(seed, epoch, n)[position * batch_size : (position + 1) * batch_size]


def batches(
    data: ImageSet,
    augment: Augment,
    *,
    seed: int,
    batch_size: int,
    steps: range,
    rank: int = 0,
    size: int = 1,
    say: Callable[[str], None] | None = None,
) -> Iterator[Batch]:
    """The batches of ``steps``, for the process ``rank`` of ``size``, on the device of the labels.

    Images in memory are indexed there. Images on disk are read ahead by worker processes, this process's share only.
    Image files are cut to their views at once, so each is decoded a single time. A batch is a function of (data, seed,
    step): neither the first step nor the numbers of workers and processes change it.

    Args:
        say: is told, once, if the steps wait for images on disk for more than ``MOST_WAITING`` of the time.

    Raises:
        UserError: a file that cannot be read.
    """
    device, n, local_size = data.labels.device, len(data), batch_size // size
    local, order = slice(rank * local_size, (rank + 1) * local_size), None
    if isinstance(data.images, OnDisk):
        augment = with_view_size(augment, data.images)
        job = _StepJob(data.images, augment, seed, batch_size, local.start, local_size, IMAGES_PER_JOB)
        keys = range(steps.start * job.jobs_per_step, steps.stop * job.jobs_per_step)
        stream: Iterator[Block] = read_ahead(job, keys, data.images.workers, pin=device.type == "cuda")
        waiting = _Waiting(data.images, say)
    for step in steps:
        epoch, position = divmod(step, n // batch_size)
        if order is None or position == 0:  # one copy to the device an epoch, not one a step
            order = epoch_order(seed, epoch, n).to(device, non_blocking=True)
        rows = order[position * batch_size : (position + 1) * batch_size]
        if isinstance(data.images, OnDisk):
            with waiting.timed():
                parts = [data.images.checked_images(block) for block in islice(stream, job.jobs_per_step)]
            images = torch.cat([part.to(device, non_blocking=True) for part in parts])
        else:
            images = data.images.index_select(0, rows[local])
        yield Batch(images, data.labels[rows])


class _Waiting:
    """How long the steps wait for ``images``; ``say`` is told once if it is too long, with what to type instead."""

    def __init__(self, images: OnDisk, say: Callable[[str], None] | None) -> None:
        self.images, self.say = images, say
        self.steps, self.begin, self.waited = -SETTLING_STEPS, 0.0, 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The block is one step's waiting."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        seconds = end - self.begin
        self.steps, self.waited = self.steps + 1, self.waited + end - start
        judged = self.steps >= JUDGED_STEPS and seconds >= JUDGED_SECONDS
        if judged and self.say is not None and self.waited > MOST_WAITING * seconds:
            self.say(self._advice(seconds))
            self.say = None
        if judged or self.steps <= 0:
            self.steps, self.begin, self.waited = min(self.steps, 0), end, 0.0

    def _advice(self, seconds: float) -> str:
        """What to type. The work of reading, in seconds of one worker, is to be done while the steps compute."""
        workers, cores = self.images.workers, own_cores()
        work = workers * seconds if workers > 0 else self.waited
        needed = max(workers + 1, math.ceil(work / max(seconds - self.waited, 1e-3 * seconds)))
        decodes = isinstance(self.images, Files)
        more = workers < cores and (workers > 0 or decodes)  # memory-mapped data has no workers
        words = [f"type dataset.workers={min(needed, cores)}"] if more else []
        if needed > cores or not more:
            cache = "type dataset.cache=<folder>, which keeps the images decoded"
            words.append(cache if decodes else "put the data on a faster disk")
        return f"training waits for images {self.waited / seconds:.0%} of the time: {', or '.join(words)}"


def with_view_size(augment: Augment, images: Tensor | OnDisk) -> Augment:
    """``augment`` with views of the size of ``images``, unless it sets a size: a cache may hold larger squares.

    Raises:
        UserError: a rotation of image files. It comes before the crop, but files are cut while they are read.
    """
    if isinstance(images, Files):
        refuse_rotation(augment)
    return replace(augment, size=augment.size or images.shape[-1])


def refuse_rotation(augment: Augment) -> None:
    """Raise ``UserError`` if ``augment`` rotates images."""
    rotation = max(recipe.rotation for recipe in augment.recipes)
    advice = "type augment.rotation=0, or give dataset.cache=<folder> or dataset.in_memory=true"
    require(rotation == 0, f"augment.rotation={rotation:g} needs whole images, not files: {advice}")


def views(data: ImageSet, augment: Augment, *, seed: int, step: int) -> Tensor:
    """The views [V N, C, S, S] that ``step`` would show if ``data`` were its batch."""
    augment = with_view_size(augment, data.images)
    images, n = data.images, len(data)
    if isinstance(images, OnDisk):
        job = _StepJob(images, augment, seed, n, 0, n, n)
        images = images.checked_images(job.read(torch.arange(n), step, slice(0, n)))
    return augment(images, seed=seed, step=step)


@dataclass(frozen=True)
class _StepJob:
    """Reads this process's images of each step in jobs of at most ``most`` images, numbered from step 0 on."""

    images: OnDisk
    augment: Augment
    seed: int
    batch_size: int
    local_start: int  # of this process's images in a batch
    local_size: int
    most: int

    @property
    def jobs_per_step(self) -> int:
        return -(-self.local_size // self.most)

    def __call__(self, key: int) -> Block:
        step, part = divmod(key, self.jobs_per_step)
        ends = (part * self.most, min((part + 1) * self.most, self.local_size))
        in_batch = slice(self.local_start + ends[0], self.local_start + ends[1])
        return self.read(batch_indices(self.seed, step, len(self.images), self.batch_size)[in_batch], step, in_batch)

    def read(self, rows: Tensor, step: int, in_batch: slice) -> Block:
        """Images ``rows``, which are the part ``in_batch`` of the batch of ``step``."""
        view_count = len(self.augment.views)
        draws = self.augment.draw(self.batch_size, seed=self.seed, step=step).select_images(view_count, in_batch)

        def boxes(height: Tensor | int, width: Tensor | int) -> Tensor:
            sizes = (side.repeat(view_count) if isinstance(side, Tensor) else side for side in (height, width))
            return draws.boxes(*sizes).unflatten(0, (view_count, -1)).transpose(0, 1)  # [B, V, 4]

        assert self.augment.size is not None
        return self.images.read_crops(rows, boxes, self.augment.size)

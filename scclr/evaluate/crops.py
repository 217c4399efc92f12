"""What the protocols that train see: labelled images in a new order in every epoch, each cropped and flipped at random.

Dimensions: N images, G of them in a step, B of these in this process, C channels, S pixels on a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scclr.augment import SAMPLE_STREAM, Augment, generator, with_channels
from scclr.config.errors import require
from scclr.datasets import ImageSet, Splits
from scclr.datasets.files import OnDisk
from scclr.datasets.loader import batches, with_view_size
from scclr.encoders.model import Model
from scclr.run import distributed

REFERENCE_BATCH = 256  # images


@dataclass(frozen=True)
class Steps:
    """Steps of ``batch_size`` images each. An epoch leaves out the images beyond its last full batch."""

    batch_size: int
    per_epoch: int
    total: int

    @classmethod
    def of(cls, images: int, batch_size: int, epochs: int) -> "Steps":
        """``epochs`` passes over ``images``, of which a batch has no more than there are. Each process takes an equal
        part of a batch, so its size is rounded down to a multiple of their number.

        Raises:
            UserError: fewer images than processes.
        """
        processes = distributed.world_size()
        size = min(images, batch_size) // processes * processes
        require(size > 0, f"{images} images of {processes} processes to train on: type a smaller nproc")
        return cls(size, images // size, epochs * (images // size))


def scaled_rates(lr: Sequence[float], steps: Steps) -> list[float]:
    """Learning rates quoted for a batch of 256 images, in proportion to the batch (SimCLR, app. B.6)."""
    return [rate * steps.batch_size / REFERENCE_BATCH for rate in lr]


def crop_and_flip(scale: list[float], flip: float) -> Augment:
    """One view of each image: a random crop of this share of its area, resized to its size, and a flip.

    Raises:
        ValueError: as ``Augment``.
    """
    return Augment(
        views=[{}], size=None, exact=False, crop_scale=scale, crop_ratio=[3 / 4, 4 / 3], flip=flip,
        rotation=0, jitter=0, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0,
        blur=0, blur_sigma=[0.1, 2.0], solarize=0,
    )  # fmt: skip


def crops(data: ImageSet, augment: Augment, steps: Steps, seed: int, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of each step in this process, floats [B, C, S, S] in [0, 1], and their labels [B].

    They are a function of (data, seed, step), as those of pretraining. In a terminal a progress bar is shown.

    Raises:
        UserError: as ``batches``.
    """
    augment, rank = with_view_size(augment, data.images), distributed.rank()
    loader = batches(
        data, augment, seed=seed, batch_size=steps.batch_size, steps=range(steps.total),
        rank=rank, size=distributed.world_size(),
    )  # fmt: skip
    hidden = None if rank == 0 else True
    for step, (images, labels) in enumerate(tqdm(loader, title, steps.total, leave=False, disable=hidden)):
        first, total = rank * len(images), len(labels)
        yield augment(images, seed=seed, step=step, first=first, total=total), distributed.shard(labels)


def known_images(splits: Splits, parts: int) -> ImageSet:
    """The training images, or with 2 ``parts`` also those of validation after them.

    On disk the two must be parts of the same files, as they are if ``splits.refit``.
    """
    sets = [splits.train, splits.validation][:parts]
    images: list[Any] = [data.images for data in sets]
    labels = torch.cat([data.labels for data in sets])
    if isinstance(images[0], OnDisk):
        return ImageSet(replace(images[0], index=torch.cat([part.index for part in images])), labels)
    return ImageSet(torch.cat(images) if parts > 1 else images[0], labels)


def labelled_share(data: ImageSet, share: float, seed: int) -> ImageSet:
    """A ``share`` of the images of each class, rounded, but one at least; a function of the arguments alone."""
    if share == 1:
        return data
    labels = data.labels.cpu()
    order = torch.randperm(len(labels), generator=generator(seed, 0, SAMPLE_STREAM))
    of_class = [order[labels[order] == c] for c in labels.unique().tolist()]
    chosen = torch.cat([rows[: max(1, round(share * len(rows)))] for rows in of_class]).sort().values
    return data[chosen.to(data.labels.device)]


@torch.no_grad()
def represent(model: Model, images: Tensor, layer: str) -> Tensor:
    """h or z [B, D] in float32 of floats [B, C, S, S] in [0, 1]. The model is in eval mode meanwhile."""
    training = model.training
    model.eval()
    images = with_channels(images, model.channels)
    found = model.represent(images).float() if layer == "h" else model(images)[1]
    model.train(training)
    return found

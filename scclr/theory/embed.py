"""Embeddings of fresh augmented views, for the theory.

Dimensions: n images, M views of each, V views a training step has, D features of h, P embedding dimensions of z,
S pixels on the side of a view.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.augment import Augment, with_channels
from scclr.datasets import ImageSet
from scclr.datasets.loader import views
from scclr.encoders.model import Model
from scclr.run.distributed import gather, rank, world_size

FRESH = 2**40  # training steps have smaller numbers, so no training has seen the views of this step and later ones


@torch.no_grad()
def embed(
    model: Model, data: ImageSet, augment: Augment, count: int, batch: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """(h [n, M, D], z [n, M, P]) of M = ``count`` fresh views of all images of ``data``, with unit rows.

    The model stays in its mode. If ``augment`` has several recipes, the views take them in turn. Each process computes
    its share of the batches of ``batch`` images; every one gets the rows of all, in the order of ``data``. The views of
    an image do not depend on the number of processes.
    """
    starts = range(0, len(data), batch)
    share = -(-len(starts) // world_size())
    own = starts[rank() * share :][:share] or starts[:1]  # without a share: a batch that only gives the shapes
    parts = []
    for first in own:
        part = data[slice(first, first + batch)]
        outputs = [model(x) for x in fresh_views(part, augment, count, model.channels, seed=seed, part=first // batch)]
        parts.append([by_image(x, len(part), count) for x in zip(*outputs, strict=True)])
    h, z = (_gather_rows(torch.cat(rows), share * batch, len(data)) for rows in zip(*parts, strict=True))
    return h, z


def fresh_views(
    data: ImageSet, augment: Augment, count: int, channels: int, *, seed: int, part: int
) -> Iterator[Tensor]:
    """As many steps' views [V n, C, S, S] as give ``count`` views of each image, none of which training has seen.

    Args:
        part: the number of these images among the parts of a set; each part has views of its own.
    """
    steps = -(-count // len(augment.views))
    for step in range(FRESH + part * steps, FRESH + (part + 1) * steps):
        yield with_channels(views(data, augment, seed=seed, step=step), channels)


def by_image(outputs: Sequence[Tensor], images: int, count: int) -> Tensor:
    """``count`` views of each image, [n, count, D], from the outputs [V n, D] of several steps."""
    return torch.cat(list(outputs)).float().unflatten(0, (-1, images))[:count].transpose(0, 1)


def _gather_rows(x: Tensor, rows: int, total: int) -> Tensor:
    """The first ``total`` rows of all processes' ``x``, each padded to ``rows``, normalized to unit length.

    All shares before the last one are full, so padding only comes after the last row.
    """
    if world_size() > 1:
        x = gather(F.pad(x, (0, 0, 0, 0, 0, rows - len(x))))
    return F.normalize(x[:total], dim=2)

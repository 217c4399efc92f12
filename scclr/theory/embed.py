"""Embeddings of fresh augmented views, for the theory.

Dimensions: n images, M views of each, D features of h, P embedding dimensions of z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.augment import Augment
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.evaluate.features import by_image, fresh_views
from scclr.run.distributed import gather, rank, world_size


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


def _gather_rows(x: Tensor, rows: int, total: int) -> Tensor:
    """The first ``total`` rows of all processes' ``x``, each padded to ``rows``, normalized to unit length.

    All shares before the last one are full, so padding only comes after the last row.
    """
    if world_size() > 1:
        x = gather(F.pad(x, (0, 0, 0, 0, 0, rows - len(x))))
    return F.normalize(x[:total], dim=2)

"""The pairs that a loss compares: every view of this process is an anchor, every view of all processes is a key.

Dimensions: V views of the B images of this process [B, P], and of the G images of all processes [G, P]. A single
process has G = B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scclr.losses.pairs import row_logsumexp, widen


class GlobalBatch(NamedTuple):
    """What all processes hold together, for a loss that computes only the anchors of its own process.

    Take the mean of ``loss(*views, labels=labels, global_batch=global_batch)`` over processes with equally many images.
    It is the loss that a single process computes from all images. The gradients agree too if ``views`` come from a
    differentiable gather.
    """

    views: tuple[Tensor, ...]  # V tensors [G, P]
    labels: Tensor | None  # int64 [G]
    start: int  # the images of this process are start, ..., start + B - 1 among the G


class Anchors:
    """Anchors ``z`` [VB, P] and the ``keys`` [VG, P] that they are compared with, in float32 or wider.

    Both hold all first views, then all second views, and so on. ``row_id`` and ``image``, int64 [VG], are the number
    and the image of every key. ``anchor_rows`` [VB] are the rows of the anchors among the keys.

    Raises:
        ValueError: if the views and the global batch do not fit together.
    """

    def __init__(
        self, views: tuple[Tensor, ...], labels: Tensor | None = None, global_batch: GlobalBatch | None = None
    ) -> None:
        shapes = [list(view.shape) for view in views]
        if len(views) < 2 or views[0].ndim != 2 or 0 in shapes[0] or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"views have shapes {shapes}: give two or more of one shape [B, P]")
        batch, width = shapes[0]
        self.is_local, start = global_batch is None, 0
        if global_batch is not None:
            start, images = global_batch.start, len(global_batch.views[0])
            if [list(view.shape) for view in global_batch.views] != [[images, width]] * len(views):
                raise ValueError(f"global_batch.views must be {len(views)} of one shape [G, {width}], as the views are")
            if not 0 <= start <= images - batch:
                raise ValueError(f"global_batch.start={start}: {batch} images from there do not fit among {images}")
        self.local_views = tuple(map(widen, views))  # V of [B, P]
        self.all_views = self.local_views if global_batch is None else tuple(map(widen, global_batch.views))
        self.images = len(self.all_views[0])  # G
        self.z = torch.cat(self.local_views)  # [VB, P]
        self.keys = self.z if global_batch is None else torch.cat(self.all_views)  # [VG, P]
        self.row_id = torch.arange(len(self.keys), device=self.z.device)
        self.image = self.row_id % self.images
        self.anchor_rows = self.row_id.view(len(views), self.images)[:, start : start + batch].flatten()  # [VB]
        self._labels, self._global_batch = labels, global_batch

    @property
    def label(self) -> Tensor:
        """Classes of the keys, int64 [VG].

        Raises:
            ValueError: if labels are missing, or not int64 with one per image.
        """
        labels = _checked("labels", self._labels, len(self.local_views[0]))
        if self._global_batch is not None:
            labels = _checked("global_batch.labels", self._global_batch.labels, self.images)
        return labels.repeat(len(self.local_views))

    def positives(self) -> Tensor:
        """Similarities of every anchor with the other views of its image, [V - 1, VB]."""
        z = self.z.view(len(self.local_views), -1, self.z.shape[1])  # [V, B, P]
        return torch.stack([(z * z.roll(-r, 0)).sum(2).flatten() for r in range(1, len(z))])

    def repel(self, temperature: float) -> Tensor:
        """log sum_k exp(s_ik / temperature), [VB], over all keys k but the anchor itself."""
        if self.is_local:
            return row_logsumexp(self.z, temperature)
        return row_logsumexp(self.z, temperature, ids=self.anchor_rows, keys=self.keys, key_ids=self.row_id)

    def negatives(self, temperature: float, *, label: Tensor | None = None, unit: bool = True) -> Tensor:
        """log sum_k exp(s_ik / temperature), [VB], over views of other images or, given ``label``, of other classes."""
        if self.is_local:
            return row_logsumexp(self.z, temperature, period=self.images, ids=label, unit=unit)
        key_ids = self.image if label is None else label
        ids = key_ids[self.anchor_rows]
        return row_logsumexp(self.z, temperature, ids=ids, keys=self.keys, key_ids=key_ids, unit=unit)

    def ntxent(self, temperature: float, *, unit: bool = True) -> tuple[Tensor, Tensor]:
        """(A_i, A_i + R_i) of NT-Xent, each [VB].

        The sum is log(1 + exp(negatives - positives)) and not a difference of large numbers. So it and its gradient
        are accurate where positives are easy and both are small.
        """
        positives = self.positives() / temperature  # [V - 1, VB]
        attract, own = -positives.mean(0), positives.logsumexp(0)  # [VB]
        gap = self.negatives(temperature, unit=unit) - own
        both = gap.logaddexp(torch.zeros_like(gap))
        if len(positives) > 1:  # with one positive, own + attract is zero, but its gradient would be rounded
            both = both + (own + attract)
        return attract, both


def _checked(name: str, labels: Tensor | None, images: int) -> Tensor:
    if labels is None:
        raise ValueError(f"a supervised loss needs {name}: give int64 [{images}], one per image")
    if labels.shape != (images,) or labels.dtype != torch.int64:
        raise ValueError(f"{name} are {labels.dtype} {list(labels.shape)}: give int64 [{images}], one per image")
    return labels

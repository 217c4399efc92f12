"""What a loss compares: the views of a batch as anchors, and everybody's views as their keys.

Dimensions: V views of B images here [B, P] and of G images in all processes [G, P]; without other processes G = B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from scclr.losses.pairs import row_logsumexp, widen


class Keys(NamedTuple):
    """What all processes hold together, for a loss that computes only its own process's anchors.

    The mean of ``loss(*views, labels=labels, keys=keys)`` over processes with equally many images is the loss of one
    process on everything: in value and, where the gather that made ``views`` is differentiable, in gradient.
    """

    views: tuple[Tensor, ...]  # V tensors [G, P], of all G images
    labels: Tensor | None  # int64 [G]
    start: int  # where this process's B images begin among the G


class Anchors:
    """``z`` [VB, P] are compared with ``pool`` [VG, P]; both hold one view after the other, in float32 or wider.

    ``view`` and ``image``, int64 [VG], number the pool's rows and their images. ``place`` [VB] is where the anchors are
    in the pool.

    Raises:
        ValueError: views or keys that do not fit together.
    """

    def __init__(self, views: tuple[Tensor, ...], labels: Tensor | None = None, keys: Keys | None = None) -> None:
        shapes = [list(view.shape) for view in views]
        if len(views) < 2 or views[0].ndim != 2 or 0 in shapes[0] or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"views have shapes {shapes}: give two or more of one shape [B, P]")
        batch, width = shapes[0]
        self.alone, start = keys is None, 0
        if keys is not None:
            start, images = keys.start, len(keys.views[0])
            if [list(view.shape) for view in keys.views] != [[images, width]] * len(views):
                raise ValueError(f"keys.views must be {len(views)} of one shape [G, {width}], as the views are")
            if not 0 <= start <= images - batch:
                raise ValueError(f"keys.start={start}: {batch} images from there do not fit among {images}")
        self.here = tuple(map(widen, views))  # V of [B, P]
        self.there = self.here if keys is None else tuple(map(widen, keys.views))  # V of [G, P]
        self.images = len(self.there[0])
        self.z = torch.cat(self.here)  # [VB, P]
        self.pool = self.z if keys is None else torch.cat(self.there)  # [VG, P]
        self.view = torch.arange(len(self.pool), device=self.z.device)
        self.image = self.view % self.images
        self.place = self.view.view(len(views), self.images)[:, start : start + batch].flatten()  # [VB]
        self._labels, self._keys = labels, keys

    @property
    def label(self) -> Tensor:
        """Classes of the pool, int64 [VG].

        Raises:
            ValueError: labels that are missing, or not int64 with one per image.
        """
        labels = _checked("labels", self._labels, len(self.here[0]))
        if self._keys is not None:
            labels = _checked("keys.labels", self._keys.labels, self.images)
        return labels.repeat(len(self.here))

    def positives(self) -> Tensor:
        """Similarities of every anchor with the other views of its image, [V - 1, VB]."""
        z = self.z.view(len(self.here), -1, self.z.shape[1])  # [V, B, P]
        return torch.stack([(z * z.roll(-r, 0)).sum(2).flatten() for r in range(1, len(z))])

    def repel(self, temperature: float | Tensor) -> Tensor:
        """log sum_k exp(s_ik / temperature), [VB], over the pool without the anchor itself."""
        if self.alone:
            return row_logsumexp(self.z, temperature)
        return row_logsumexp(self.z, temperature, ids=self.place, keys=self.pool, key_ids=self.view)

    def negatives(self, temperature: float | Tensor, *, label: Tensor | None = None, unit: bool = True) -> Tensor:
        """log sum_k exp(s_ik / temperature), [VB], over views of other images or, given ``label``, of other classes."""
        if self.alone:
            return row_logsumexp(self.z, temperature, period=self.images, ids=label, unit=unit)
        key_ids = self.image if label is None else label
        ids = key_ids[self.place]
        return row_logsumexp(self.z, temperature, ids=ids, keys=self.pool, key_ids=key_ids, unit=unit)

    def ntxent(self, temperature: float | Tensor, *, unit: bool = True) -> tuple[Tensor, Tensor]:
        """(A_i, A_i + R_i) of NT-Xent, each [VB].

        The sum is log(1 + exp(negatives - positives)) rather than a difference of large numbers, so it and its gradient
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

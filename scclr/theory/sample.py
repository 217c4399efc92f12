"""A sample of labelled images, each seen in M views, and the sums over it that every estimate is computed from.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IMAGES_AT_ONCE = 1024  # images that are converted to float64 at a time
UNIT_TOLERANCE = 1e-2  # allowed error of |z|^2, which rows computed in bfloat16 meet
LEAST_IMAGES = 4  # the correlations between views are fitted on one half of the images and evaluated on the other


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is 0 for a whole population and NaN where the sample is too small."""

    value: float
    se: float


class Sums(NamedTuple):
    """Sums over images, by group and class. ``zb`` is the mean of an image's views."""

    n: Tensor  # [G, C]: number of images
    total: Tensor  # [G, C, d]: sum of zb
    square: Tensor  # [G, C]: sum of |zb|^2
    pairs: Tensor  # [G, C]: sum of a_i, which estimates |mu_x|^2


class Moments(NamedTuple):
    """Estimates of a = E |mu_x|^2, b = |mu_y|^2 by class [C], the classes' shares [C], and g = |mu|^2."""

    a: Tensor
    b: Tensor
    share: Tensor
    g: Tensor


class Sample:
    """Embeddings of labelled images with the sums over them. Classes with one image are dropped.

    Args:
        z: [n, M, d], unit rows of any float dtype. Sums are in float64.
        labels: int64 [n].
        population: take the rows as the whole population, each image with probability 1 / n, not as a sample of it.
        groups: into how many groups a sample is divided, evenly within each class.
        least_classes: how many classes have to be left.

    Raises:
        ValueError: shapes that do not fit, one view, values that are not finite or not of unit length, missing labels,
            or fewer than ``least_classes`` classes with two images.
    """

    def __init__(self, z: Tensor, labels: Tensor, *, population: bool, groups: int = 1, least_classes: int = 1) -> None:
        if z.ndim != 3 or labels.shape != z.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"z is {list(z.shape)}, labels {labels.dtype} {list(labels.shape)}: give z [n, M, d] and int64 [n]"
            )
        if z.shape[1] < 2 and not population:
            raise ValueError("z has one view of every image: its mean over augmentations needs two or more")
        _check_rows(z)
        self.views = z.shape[1]
        self.own = 0 if population else 1  # how many images an image leaves out of its comparisons: itself, or none
        counts = _count_classes(labels, least_images=1 + self.own, least_classes=least_classes)
        self.kept = counts > self.own
        self.dropped: list[int] = (counts == 1).nonzero().flatten().tolist() if self.own else []
        if not self.kept.all():
            rows = self.kept[labels]
            z, labels = z[rows], labels[rows]
        self.z, self.labels = z, (self.kept.cumsum(0) - 1)[labels]
        self.images, self.classes = len(z), int(self.kept.sum())
        groups = 1 if population else max(1, min(groups, self.images - self.images % 2))  # even: cross-splits take half
        self.groups = groups
        self.versions = [None] if groups == 1 else [None, *range(groups)]  # which group an estimate leaves out
        self.group = self.labels.argsort(stable=True).argsort() % self.groups  # dealt in turn, in the order of classes
        self.sums = self._sums()

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(z in float64 [b, M, d], labels [b], groups [b]), part by part."""
        parts = (x.split(IMAGES_AT_ONCE) for x in (self.z, self.labels, self.group))
        for z, labels, group in zip(*parts, strict=True):
            yield z.double(), labels, group

    def squared_mean(self, z: Tensor) -> Tensor:
        """a_i [b] of z [b, M, d]: the mean product of two views of an image; of two different ones in a sample."""
        mean2, each = z.mean(1).square().sum(1), z.square().sum((1, 2))
        return (self.views**2 * mean2 - self.own * each) / (self.views * (self.views - self.own))

    def _sums(self) -> Sums:
        cells, d = self.groups * self.classes, self.z.shape[2]
        sums = torch.zeros(cells, d + 3, dtype=torch.float64, device=self.z.device)
        for z, labels, group in self.chunks():
            zb = z.mean(1)  # [b, d]
            columns = [torch.ones_like(zb[:, :1]), zb.square().sum(1, True), self.squared_mean(z).unsqueeze(1), zb]
            sums.index_add_(0, group * self.classes + labels, torch.cat(columns, 1))
        sums = sums.view(self.groups, self.classes, -1)
        return Sums(sums[:, :, 0], sums[:, :, 3:], sums[:, :, 1], sums[:, :, 2])

    def without(self, group: int | None) -> Sums:
        """Sums by class over all groups, or over all groups but one."""
        return Sums(*(s.sum(0) - (0 if group is None else s[group]) for s in self.sums))

    def moments(self, without: int | None = None) -> Moments:
        """The moments of all groups, or of all groups but one."""
        count, total, square, pairs = self.without(without)
        n, own = count.sum(), self.own
        b = (total.square().sum(1) - own * square) / (count * (count - own))
        g = (total.sum(0).square().sum() - own * square.sum()) / (n * (n - own))
        return Moments(pairs.sum() / n, b, count / n, g)


def check_labels(labels: Tensor) -> None:
    """Check before any embedding is computed that the images with ``labels``, int64 [n], suffice for the theory.

    Raises:
        ValueError: missing labels, fewer than four images, or fewer than two classes with two images or more.
    """
    if len(labels) < LEAST_IMAGES:
        raise ValueError(f"{len(labels)} images are too few: give {LEAST_IMAGES} or more")
    _count_classes(labels, least_images=2, least_classes=2)


def _count_classes(labels: Tensor, *, least_images: int, least_classes: int) -> Tensor:
    """Images of each class, [C]. Raises ``ValueError`` as ``check_labels``."""
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{missing} images have no label: prototypes are means over a class")
    counts = labels.bincount()
    enough = int((counts >= least_images).sum())
    if enough == 0:
        raise ValueError(f"no class has {least_images} images: a prototype is the mean over images of one class")
    if enough < least_classes:
        raise ValueError(f"only one class has {least_images} images: repulsion needs a second one")
    return counts


def _check_rows(z: Tensor) -> None:
    """Raise ``ValueError`` unless all rows of z are finite and of unit length."""
    length2 = torch.cat([part.double().square().sum(2) for part in z.split(IMAGES_AT_ONCE)])  # [n, M]
    not_finite = int(length2.isfinite().logical_not().sum())
    if not_finite:
        raise ValueError(f"{not_finite} rows of z are not finite")
    not_unit = int(((length2 - 1).abs() > UNIT_TOLERANCE).sum())
    if not_unit:
        raise ValueError(f"{not_unit} rows of z are not of unit length: divide every row by its norm")

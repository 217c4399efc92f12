"""Images of known classes, each seen in M views, and the sums over them that every estimate here is made of.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.distributed import World

CHUNK = 1024  # images in float64 at a time
UNIT = 1e-2  # allowed error of |z|^2: bfloat16 rows pass


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error: 0 for a whole population, NaN where the sample is too small to say."""

    value: float
    se: float


class Sums(NamedTuple):
    """Sums over images, by group of images and class. They add: over parts of the data, processes, groups."""

    n: Tensor  # [G, C]
    total: Tensor  # [G, C, d]: zb, the mean view of an image
    square: Tensor  # [G, C]: |zb|^2
    pairs: Tensor  # [G, C]: a_i, which estimates |mu_x|^2


class Moments(NamedTuple):
    """Estimates of E |mu_x|^2, of |mu_y|^2 by class [C] with the classes' shares [C], and of |mu|^2."""

    a: Tensor
    b: Tensor
    share: Tensor
    g: Tensor


class Sample:
    """What every estimate here is a function of: images of known classes, each seen in M views.

    Classes with one image are dropped. With ``world``, z and labels are this process's part, and every result is that
    of all parts together.

    Args:
        z: [n, M, d], unit rows of any float dtype; sums are in float64.
        labels: int64 [n].
        population: the rows are everything there is, each image with its share 1 / n, rather than a sample of it.
        groups: how many groups the images are dealt to, evenly within each class.

    Raises:
        ValueError: shapes that do not fit, one view, values that are not finite or not of unit length, missing labels,
            no class with two images.
    """

    def __init__(self, z: Tensor, labels: Tensor, *, population: bool, world: World, groups: int = 1) -> None:
        if z.ndim != 3 or labels.shape != z.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"z is {list(z.shape)}, labels {labels.dtype} {list(labels.shape)}: give z [n, M, d] and int64 [n]"
            )
        if z.shape[1] < 2 and not population:
            raise ValueError("z has one view of every image: its mean over augmentations needs two or more")
        _check(z, labels, world)
        self.world, self.views = world, z.shape[1]
        self.own = 0 if population else 1  # how often an image is left out of what it is compared with
        top = int(world.gather(labels.max().view(1) if len(labels) else labels.new_tensor([-1])).max()) + 1
        counts = labels.bincount(minlength=top)
        everywhere = world.gather(counts.unsqueeze(0))  # [W, C]
        self.kept = everywhere.sum(0) > self.own
        if not self.kept.any():
            raise ValueError("every class has one image: prototypes need classes with two or more")
        self.dropped: list[int] = (everywhere.sum(0) == 1).nonzero().flatten().tolist() if self.own else []
        new = self.kept.cumsum(0) - 1
        if not self.kept.all():
            mine = self.kept[labels]
            z, labels, everywhere = z[mine], labels[mine], everywhere[:, self.kept]
        self.z, self.labels = z, new[labels]
        self.images, self.classes = int(everywhere.sum()), everywhere.shape[1]
        self.groups = max(
            1, min(groups, self.images - self.images % 2)
        )  # even, if more than one: halves are made of them
        before = everywhere[: world.rank].sum(0) + everywhere.sum(0).cumsum(0) - everywhere.sum(0)  # [C]
        self.group = _position(self.labels, before) % self.groups
        self.sums = self._sums()

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(z in float64 [b, M, d], labels [b]), part by part."""
        for z, labels in zip(self.z.split(CHUNK), self.labels.split(CHUNK), strict=True):
            yield z.double(), labels

    def squared_mean(self, z: Tensor) -> Tensor:
        """a_i: the mean product of two views of an image of z [b, M, d], different ones unless a population, [b]."""
        mean2, each = z.mean(1).square().sum(1), z.square().sum((1, 2))
        return (self.views**2 * mean2 - self.own * each) / (self.views * (self.views - self.own))

    def _sums(self) -> Sums:
        cells, d = self.groups * self.classes, self.z.shape[2]
        sums = torch.zeros(cells, d + 3, dtype=torch.float64, device=self.z.device)
        for (z, labels), group in zip(self.chunks(), self.group.split(CHUNK), strict=True):
            zb = z.mean(1)  # [b, d]
            columns = [torch.ones_like(zb[:, :1]), zb.square().sum(1, True), self.squared_mean(z).unsqueeze(1), zb]
            sums.index_add_(0, group * self.classes + labels, torch.cat(columns, 1))
        sums = self.world.sum(sums).view(self.groups, self.classes, -1)
        return Sums(sums[:, :, 0], sums[:, :, 3:], sums[:, :, 1], sums[:, :, 2])

    def without(self, group: int | None) -> Sums:
        """Sums by class, of all groups or of all but one."""
        return Sums(*(s.sum(0) - (0 if group is None else s[group]) for s in self.sums))

    def moments(self, without: int | None = None) -> Moments:
        """Of all groups, or of all but one."""
        count, total, square, pairs = self.without(without)
        n, own = count.sum(), self.own
        b = (total.square().sum(1) - own * square) / (count * (count - own))
        g = (total.sum(0).square().sum() - own * square.sum()) / (n * (n - own))
        return Moments(pairs.sum() / n, b, count / n, g)


def _position(labels: Tensor, before: Tensor) -> Tensor:
    """Where each image stands when all are sorted by class, [n]; ``before`` [C] of its class come from elsewhere."""
    order = labels.argsort(stable=True)
    counts = labels.bincount(minlength=len(before))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place - (counts.cumsum(0) - counts)[labels] + before[labels]


def _check(z: Tensor, labels: Tensor, world: World) -> None:
    """Every process raises what any of them finds."""
    found = torch.zeros(3, dtype=torch.int64, device=z.device)
    for part in z.split(CHUNK):
        length = part.double().square().sum(2)
        finite = length.isfinite()
        found += torch.stack([(~finite).sum(), (finite & ((length - 1).abs() > UNIT)).sum(), 0 * finite.sum()])
    found[2] = (labels < 0).sum()
    bad, long, unlabelled = world.sum(found).tolist()
    if bad:
        raise ValueError(f"{bad} rows of z are not finite")
    if long:
        raise ValueError(f"{long} rows of z are not of unit length: divide every row by its norm")
    if unlabelled:
        raise ValueError(f"{unlabelled} images have no label: prototypes are means over a class")

"""Sums of exp(similarity / tau) over all pairs of views of a sample, and the jackknife.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images, T temperatures tau,
b images in a tile.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.theory.sample import Sample

TILE_VIEWS = 512  # views that a tile compares with a group; on two cores in float64, 256 and 1024 are no faster
JACKKNIFE_GROUPS = 20  # the relative error of a standard error is 1 / sqrt(2 (G - 1)), here 16 %


class Tile(NamedTuple):
    """Sums for b images as anchors, of exp((similarity - 1) / tau) over the views of other images.

    In a population the other images include the anchor's own. The sum over other classes is not the difference of two
    sums: where classes are far apart, the difference would be lost to rounding.
    """

    z: Tensor  # [b, M, d]
    labels: Tensor  # [b]
    group: Tensor  # [b]
    same: Tensor  # [T, G, b, M]: over images of the anchor's class, by their group
    other: Tensor  # [T, G, b, M]: over images of other classes, by their group
    positive: Tensor  # [T, b, M]: over the other views of the anchor's image


def pair_sums(sample: Sample, temperatures: Sequence[float]) -> Iterator[Tile]:
    """All images as anchors, tile by tile, compared with all images in float64; O(n M d) memory."""
    views = sample.views
    order = (sample.group * sample.classes + sample.labels).argsort(stable=True)  # by group, then by class
    keys, position = sample.z[order].double(), order.argsort()
    sizes = sample.sums.n.long().tolist()  # [G][C]
    shape = len(temperatures), sample.groups
    for index in sample.labels.argsort(stable=True).split(max(1, TILE_VIEWS // views)):
        anchors, label, group = sample.z[index].double(), sample.labels[index], sample.group[index]
        rows = anchors.flatten(0, 1)  # [b M, d]
        runs = list(zip(*(x.tolist() for x in label.unique_consecutive(return_counts=True)), strict=True))
        same, other = rows.new_zeros(2, *shape, len(rows)).unbind(0)
        first = 0  # position of the group's first key
        for g, by_class in enumerate(sizes):
            part = keys[first : first + sum(by_class)].flatten(0, 1)
            similarity = (rows @ part.T).sub_(1)  # [b M, n_g M]
            if sample.own:
                in_group = (group == g).nonzero().squeeze(1)
                by_image = similarity.view(len(index), views, sum(by_class), views)
                by_image[in_group, :, position[index[in_group]] - first] = -torch.inf
            first += sum(by_class)
            exponential = torch.empty_like(similarity)
            for t, temperature in enumerate(temperatures):
                torch.div(similarity, temperature, out=exponential).exp_()
                start = 0
                for c, images in runs:
                    stop, left = start + images * views, sum(by_class[:c]) * views
                    right = left + by_class[c] * views
                    block = exponential[start:stop]
                    same[t, g, start:stop] = block[:, left:right].sum(1)
                    other[t, g, start:stop] = block[:, :left].sum(1) + block[:, right:].sum(1)
                    start = stop
        within = anchors @ anchors.transpose(1, 2)  # [b, M, M]
        within.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        positive = torch.stack([((within - 1) / temperature).exp().sum(2) for temperature in temperatures])
        tile = (*shape, len(index), views)
        yield Tile(anchors, label, group, same.view(tile), other.view(tile), positive)


def sum_without(x: Tensor, group: int | None) -> Tensor:
    """Sum of x [T, G, ...] over all groups, or over all but one. A difference would lose small sums to rounding."""
    return x.sum(1) if group is None else x[:, :group].sum(1) + x[:, group + 1 :].sum(1)


def certified_mean(total: Tensor, images: Tensor | int, views: int, temperature: Tensor | float) -> Tensor:
    """log of the mean of exp(similarity / tau) over ``images``, where the anchor's image counts with similarity 1.

    ``total`` is the sum over the views of the other images, divided by exp(1 / tau). The expectation is at least the
    logarithm of the population's mean, for any number of images, because 1 is the largest similarity and the logarithm
    is concave (README.md, section 4).
    """
    return ((views + total) / (views * images)).log() + 1 / temperature


def jackknife(values: Tensor) -> tuple[Tensor, Tensor]:
    """(value without its bias of order 1 / n, standard error) from values [1 + G, ...]: of all, and without each group.

    The standard error is NaN where it cannot be computed, and 0 for a population, which has no groups to leave out.
    """
    whole, parts = values[0], values[1:]
    groups = len(parts)
    if groups == 0:
        return whole, torch.zeros_like(whole)
    error = ((groups - 1) / groups * (parts - parts.mean(0)).square().sum(0)).sqrt()
    return groups * whole - (groups - 1) * parts.mean(0), torch.where(error.isfinite(), error, torch.nan)

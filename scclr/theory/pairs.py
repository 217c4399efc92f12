"""Sums of exp(similarity / tau) over all pairs of a sample, and the softmax mass that falls on the own class.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images; T temperatures tau;
b images in a tile.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.distributed import World
from scclr.theory.sample import Estimate, Sample

ROWS = 512  # views in a tile, against a group's; on two cores, float64, 256 and 1024 are no faster
GROUPS = 20  # of the delete-a-group jackknife: its standard errors are good to 1 / sqrt(2 (G - 1)), 16 %


class Tile(NamedTuple):
    """b images as anchors. Sums are over the views of other images (in a population, of all), over exp(1 / tau)."""

    z: Tensor  # [b, M, d]
    labels: Tensor  # [b]
    group: Tensor  # [b]
    same: Tensor  # [T, G, b, M], by group of the other image: of those of the own class
    other: (
        Tensor  # [T, G, b, M]: of those of other classes; as a difference it would vanish where classes are far apart
    )
    positive: Tensor  # [T, b, M]: over the other views of the own image


def pair_sums(sample: Sample, temperatures: Sequence[float]) -> Iterator[Tile]:
    """This process's images as anchors against those of all, in float64; O(n M d) memory."""
    views, world = sample.views, sample.world
    z, labels, group = (everyone(x, world) for x in (sample.z, sample.labels, sample.group))
    order = (group * sample.classes + labels).argsort(stable=True)
    keys, place = z[order].double(), order.argsort()  # by group, then by class
    sizes = sample.sums.n.long().tolist()  # [G][C]
    start = int(everyone(torch.tensor([len(sample.z)], device=z.device), world)[: world.rank].sum())
    shape = len(temperatures), sample.groups
    for index in sample.labels.argsort(stable=True).split(max(1, ROWS // views)):
        anchors, label, spot = sample.z[index].double(), sample.labels[index], place[start + index]
        rows = anchors.flatten(0, 1)  # [b M, d]
        runs = list(zip(*(x.tolist() for x in label.unique_consecutive(return_counts=True)), strict=True))
        same, other = rows.new_zeros(2, *shape, len(rows)).unbind(0)
        first = 0
        for g, by_class in enumerate(sizes):
            part = keys[first : first + sum(by_class)].flatten(0, 1)
            similarity = rows @ part.T  # [b M, n_g M]
            if sample.own:
                here = (sample.group[index] == g).nonzero().squeeze(1)
                tiled = similarity.view(len(index), views, sum(by_class), views)
                tiled[here, :, spot[here] - first] = -torch.inf
            first += sum(by_class)
            exponential = torch.empty_like(similarity)
            for t, temperature in enumerate(temperatures):
                torch.sub(similarity, 1, out=exponential).div_(temperature).exp_()
                row = 0
                for c, images in runs:
                    below, begin = row + images * views, sum(by_class[:c]) * views
                    end = begin + by_class[c] * views
                    block = exponential[row:below]
                    same[t, g, row:below] = block[:, begin:end].sum(1)
                    other[t, g, row:below] = block[:, :begin].sum(1) + block[:, end:].sum(1)
                    row = below
        within = anchors @ anchors.transpose(1, 2)  # [b, M, M]
        within.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        positive = torch.stack([((within - 1) / temperature).exp().sum(2) for temperature in temperatures])
        tile = (*shape, len(index), views)
        yield Tile(anchors, label, sample.group[index], same.view(tile), other.view(tile), positive)


def leave_out(x: Tensor, group: int | None, dim: int) -> Tensor:
    """Sum over the groups in ``dim``, or over all but one: added up, since a difference would lose small sums."""
    return (
        x.sum(dim)
        if group is None
        else x.narrow(dim, 0, group).sum(dim) + x.narrow(dim, group + 1, x.shape[dim] - group - 1).sum(dim)
    )


def certified_mean(total: Tensor, images: Tensor | int, views: int, temperature: Tensor | float) -> Tensor:
    """log of the mean of exp(s / tau) over ``images``, the anchor's own one counted with similarity 1.

    ``total`` is the sum over the views of the other images, over exp(1 / tau). The expectation is at least that of the
    logarithm of the population's mean, for any number of images: 1 is the largest similarity there is, and the
    logarithm is concave (README.md, section 4).
    """
    return ((views + total) / (views * images)).log() + 1 / temperature


def jackknife(values: Tensor, *, population: bool) -> tuple[Tensor, Tensor]:
    """(value less its bias of order 1 / n, standard error) of values [1 + G, ...]: of all, and without each group."""
    whole, parts = values[0], values[1:]
    groups = len(parts)
    if population:
        return whole, torch.zeros_like(whole)
    error = ((groups - 1) / groups * (parts - parts.mean(0)).square().sum(0)).sqrt()
    return groups * whole - (groups - 1) * parts.mean(0), torch.where(error.isfinite(), error, torch.nan)


def same_class_mass(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    population: bool = False,
    world: World = World(),  # noqa: B008
) -> Estimate:
    """q_same: the mean softmax mass that the views of other images of the anchor's class have among all others.

    z: [n, M, d] unit rows; labels: int64 [n].

    Raises:
        ValueError: as ``Sample``.
    """
    return _of_mass(lambda same, other: same / (same + other), z, labels, temperature, population, world)


def nscl_gap(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    population: bool = False,
    world: World = World(),  # noqa: B008
) -> Estimate:
    """E -log(1 - q), q the anchor's mass on its own class: by this a decoupled loss exceeds its negatives-only
    supervised twin (Luthra et al. 2025), times 2 (1 - alpha). Their bound log(1 + e^(2 / tau) / (C - 1)) holds for all
    embeddings, and is above 5 at tau <= 0.2 and C <= 10; this is its value.

    z: [n, M, d] unit rows; labels: int64 [n].

    Raises:
        ValueError: as ``Sample``.
    """
    return _of_mass(lambda same, other: torch.log1p(same / other), z, labels, temperature, population, world)


@torch.no_grad()
def _of_mass(
    function: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    labels: Tensor,
    temperature: float,
    population: bool,
    world: World,
) -> Estimate:
    sample = Sample(z, labels, population=population, world=world, groups=1 if population else GROUPS)
    sums = torch.zeros(
        sample.groups, sample.groups + 1, dtype=torch.float64, device=z.device
    )  # anchors' group, without
    for _, _, group, *masses, _ in pair_sums(sample, [temperature]):
        versions = [
            function(*(leave_out(mass[0], without, 0) for mass in masses)) for without in (None, *range(sample.groups))
        ]
        sums.index_add_(0, group, torch.stack(versions).mean(2).T)
    sums, count = world.sum(sums), sample.sums.n.sum(1)
    parts = (sums[:, 1:].sum(0) - sums.diagonal(1)) / (sample.images - count)
    values = torch.cat([sums[:, 0].sum().view(1) / sample.images, parts])
    return Estimate(values[0].item(), jackknife(values, population=population)[1].item())


def everyone(x: Tensor, world: World) -> Tensor:
    """``x`` [n, ...] of all processes, in the order of ranks; n may differ."""
    if world.size == 1:
        return x
    sizes = world.gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    parts = world.gather(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

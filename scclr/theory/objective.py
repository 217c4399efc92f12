"""The supervised objective of which the contrastive loss is an approximation, measured on a sample.

Dimensions: n images, M views of each, d embedding dimensions, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.distributed import World
from scclr.theory.pairs import GROUPS, jackknife
from scclr.theory.sample import Estimate, Sample


@dataclass(frozen=True)
class Objective:
    """L_sup = attract + lam repel, attract = -E <F, mu_Y>, repel = E max_{y != Y} <F, mu_y>; bracketed in the mean."""

    lam: float
    attract: Estimate  # unbiased
    repel_upper: Estimate  # plug-in: the largest of noisy values is too large in the mean
    repel_lower: Estimate  # cross-split: chosen by one half's prototypes, valued by the other's; too small in the mean
    upper: Estimate
    lower: Estimate


@torch.no_grad()
def supervised_objective(
    z: Tensor,
    labels: Tensor,
    lam: float,
    *,
    population: bool = False,
    world: World = World(),  # noqa: B008
) -> Objective:
    """Of z [n, M, d] (unit rows) and int64 labels [n]; errors by a delete-a-group jackknife at fixed class shares.

    Raises:
        ValueError: as ``Sample``; fewer than two classes.
    """
    sample = Sample(z, labels, population=population, world=world, groups=1 if population else GROUPS)
    if sample.classes < 2:
        raise ValueError("one class only: there is no other to be repelled from")
    versions = [None] if population else [None, *range(sample.groups)]
    sums = z.new_zeros(len(versions), 2, dtype=torch.float64)
    groups = iter(sample.group.split([len(part) for _, part in sample.chunks()]))
    for part, y in sample.chunks():
        group = next(groups)
        mine = F.one_hot(y, sample.classes).bool().unsqueeze(1)  # [b, 1, C]
        for version, without in enumerate(versions):
            kept = torch.ones_like(group, dtype=torch.bool) if without is None else group != without
            z_kept, mask = part[kept], mine[kept]
            upper = _to_prototypes(sample, z_kept, slice(None), without).masked_fill(mask, -torch.inf).amax(2)
            lower = upper
            if not population:
                a, b = (
                    _to_prototypes(sample, z_kept, slice(half, None, 2), without).masked_fill(mask, -torch.inf)
                    for half in (0, 1)
                )  # [b, M, C]
                lower = (b.gather(2, a.argmax(2, True)) + a.gather(2, b.argmax(2, True))).squeeze(2) / 2
            sums[version] += torch.stack([upper.mean(1).sum(), lower.mean(1).sum()])
    sums, rows = world.sum(sums), []
    for version, without in enumerate(versions):
        _, b, share, _ = sample.moments(without)
        repel = sums[version] / sample.without(without).n.sum()
        attract = -(share @ b).view(1)
        rows.append(torch.cat([attract, repel, attract + lam * repel]))
    values = torch.stack(rows)  # [1 + G, 5]
    error = jackknife(values, population=population)[1]
    return Objective(lam, *(Estimate(*pair) for pair in zip(values[0].tolist(), error.tolist(), strict=True)))


def _to_prototypes(sample: Sample, z: Tensor, groups: slice, without: int | None) -> Tensor:
    """<F, mu_y> of z [b, M, d] with the prototypes of some groups, [b, M, C]."""
    count, total = sample.sums.n[groups].sum(0), sample.sums.total[groups].sum(0)
    if without is not None and without in range(sample.groups)[groups]:
        count, total = count - sample.sums.n[without], total - sample.sums.total[without]
    return z @ (total / count.unsqueeze(1)).T

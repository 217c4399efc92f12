"""The supervised objective that the contrastive loss approximates, estimated from a sample.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.theory.pairs import JACKKNIFE_GROUPS, jackknife
from scclr.theory.sample import Estimate, Sample


@dataclass(frozen=True)
class Objective:
    """L_sup = attract + lam repel with attract = -E <F, mu_Y> and repel = E max_{y != Y} <F, mu_y>.

    In expectation L_sup lies between ``lower`` and ``upper``.
    """

    lam: float
    attract: Estimate  # unbiased
    repel_upper: Estimate  # plug-in: the maximum over noisy prototypes is too large in expectation
    repel_lower: Estimate  # cross-split: one half's prototypes choose, the other half's give the value; too small
    upper: Estimate
    lower: Estimate


@torch.no_grad()
def supervised_objective(z: Tensor, labels: Tensor, lam: float, *, population: bool = False) -> Objective:
    """The objective of z [n, M, d] (unit rows) with int64 labels [n].

    Standard errors are from a delete-a-group jackknife at fixed class shares.

    Raises:
        ValueError: as ``Sample``, or fewer than two classes.
    """
    sample = Sample(z, labels, population=population, groups=JACKKNIFE_GROUPS, least_classes=2)
    sums = z.new_zeros(len(sample.versions), 2, dtype=torch.float64)
    for part, y, group in sample.chunks():
        own_class = F.one_hot(y, sample.classes).bool().unsqueeze(1)  # [b, 1, C]
        for version, without in enumerate(sample.versions):
            kept = slice(None) if without is None else group != without
            z_kept, mask = part[kept], own_class[kept]
            upper = _to_prototypes(sample, z_kept, slice(None), without).masked_fill(mask, -torch.inf).amax(2)
            lower = upper
            if not population:
                even, odd = (
                    _to_prototypes(sample, z_kept, slice(half, None, 2), without).masked_fill(mask, -torch.inf)
                    for half in (0, 1)
                )  # [b, M, C]
                chosen = odd.gather(2, even.argmax(2, True)) + even.gather(2, odd.argmax(2, True))
                lower = chosen.squeeze(2) / 2
            sums[version] += torch.stack([upper.mean(1).sum(), lower.mean(1).sum()])
    rows = []
    for version, without in enumerate(sample.versions):
        _, b, share, _ = sample.moments(without)
        repel = sums[version] / sample.without(without).n.sum()
        attract = -(share @ b).view(1)
        rows.append(torch.cat([attract, repel, attract + lam * repel]))
    values = torch.stack(rows)  # [1 + G, 5]
    _, error = jackknife(values)
    return Objective(lam, *(Estimate(*pair) for pair in zip(values[0].tolist(), error.tolist(), strict=True)))


def _to_prototypes(sample: Sample, z: Tensor, groups: slice, without: int | None) -> Tensor:
    """<F, mu_y> [b, M, C] of z [b, M, d] with the prototypes of some groups, of which ``without`` is left out."""
    count, total = sample.sums.n[groups].sum(0), sample.sums.total[groups].sum(0)
    if without is not None and without in range(sample.groups)[groups]:
        count, total = count - sample.sums.n[without], total - sample.sums.total[without]
    return z @ (total / count.unsqueeze(1)).T

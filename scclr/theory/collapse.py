"""How far classes have collapsed to points, and these to a simplex: neural collapse (Papyan et al. 2020).

Dimensions: n images, M views of each, d embedding dimensions, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.distributed import World
from scclr.theory.sample import Sample


@dataclass(frozen=True)
class Collapse:
    """``z`` at neural collapse: nc1 0, etf_mean -1 / (C - 1), etf_sd 0, rho all equal, cdnv 0, effective rank C - 1."""

    nc1: float  # tr(S_W S_B^+) / C of the covariances of views within, and of prototypes between, the classes
    etf_mean: float  # cosines between prototypes, their mean taken off: of all pairs, mean
    etf_sd: float  # and standard deviation
    rho: list[float]  # lengths of the prototypes, of the kept classes
    cdnv: float  # class-distance normalised variance, mean over pairs, its distances without bias (Galanti et al. 2022)
    effective_rank: float  # exp of the entropy of the singular values of z
    spectrum: list[float]  # eigenvalues of E f f^T, falling; they add to 1


@torch.no_grad()
def collapse(z: Tensor, labels: Tensor, *, population: bool = False, world: World = World()) -> Collapse:  # noqa: B008
    """Of z [n, M, d] (unit rows) and int64 labels [n]; O(d^2) memory. NaN for what needs two classes, or apart ones.

    Raises:
        ValueError: as ``Sample``.
    """
    sample = Sample(z, labels, population=population, world=world)
    count, total = sample.sums.n[0], sample.sums.total[0]
    second = torch.zeros(z.shape[2], z.shape[2], dtype=torch.float64, device=z.device)
    for part, _ in sample.chunks():
        rows = part.flatten(0, 1)
        second += rows.T @ rows
    second = world.sum(second) / (sample.images * sample.views)  # E f f^T
    share, prototypes = count / sample.images, total / count.unsqueeze(1)
    weighted = prototypes * share.sqrt().unsqueeze(1)
    within = second - weighted.T @ weighted
    centred = prototypes - prototypes.mean(0)  # of classes alike, as in the simplex
    between = centred.T @ centred / sample.classes
    inverse = torch.linalg.pinv(between, hermitian=True, rtol=1e-10)
    b = sample.moments().b
    pair = torch.triu_indices(sample.classes, sample.classes, 1, device=z.device)
    direction = F.normalize(centred, dim=1)
    cosines = (direction @ direction.T)[pair[0], pair[1]]
    apart = b[pair[0]] + b[pair[1]] - 2 * (prototypes @ prototypes.T)[pair[0], pair[1]]  # |mu_c - mu_c'|^2
    cdnv = (2 - b[pair[0]] - b[pair[1]]) / (2 * torch.where(apart > 0, apart, torch.nan))  # V_c = 1 - |mu_c|^2
    spectrum = torch.linalg.eigvalsh(second).flip(0).clamp(min=0)
    singular = spectrum.sqrt()
    return Collapse(
        nc1=((within * inverse).sum() / sample.classes).item(),
        etf_mean=cosines.mean().item(),
        etf_sd=cosines.std(correction=0).item() if len(cosines) else torch.nan,
        rho=b.clamp(min=0).sqrt().tolist(),
        cdnv=cdnv.nanmean().item(),
        effective_rank=torch.special.entr(singular / singular.sum()).sum().exp().item(),
        spectrum=spectrum.tolist(),
    )

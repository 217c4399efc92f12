"""Neural collapse: how close classes are to points, and these points to a simplex (Papyan et al. 2020).

Dimensions: n images, M views of each, d embedding dimensions, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.evaluate.quality import entropy_rank
from scclr.run.machine import decompose
from scclr.theory.sample import Sample


@dataclass(frozen=True)
class Collapse:
    """At neural collapse nc1 = etf_sd = cdnv = 0, etf_mean = -1 / (C - 1), rho is constant, effective_rank = C - 1."""

    nc1: float  # tr(S_W S_B^+) / C of the covariance of views within classes and that of prototypes
    etf_mean: float  # mean over pairs of classes of the cosine between centred prototypes
    etf_sd: float  # standard deviation of these cosines
    rho: list[float]  # length of the prototype of each class that was not dropped
    cdnv: float  # class-distance normalized variance, mean over pairs of classes (Galanti et al. 2022)
    effective_rank: float  # exp of the entropy of the singular values of z
    spectrum: list[float]  # eigenvalues of E z z^T in descending order; they sum to 1


@torch.no_grad()
def collapse(z: Tensor, labels: Tensor, *, population: bool = False) -> Collapse:
    """Neural collapse of z [n, M, d] (unit rows) with int64 labels [n]; O(d^2) memory.

    The squared distances between prototypes that cdnv divides by are unbiased. With one class, or where all prototypes
    coincide, what compares classes is NaN.

    Raises:
        ValueError: as ``Sample``.
    """
    sample = Sample(z, labels, population=population)
    count, total = sample.sums.n[0], sample.sums.total[0]
    second = torch.zeros(z.shape[2], z.shape[2], dtype=torch.float64, device=z.device)
    for part, _, _ in sample.chunks():
        rows = part.flatten(0, 1)
        second += rows.T @ rows
    second = second / (sample.images * sample.views)  # E z z^T
    share, prototypes = count / sample.images, total / count.unsqueeze(1)
    weighted = prototypes * share.sqrt().unsqueeze(1)
    within = second - weighted.T @ weighted
    centred = prototypes - prototypes.mean(0)  # every class with the same weight, as in the simplex
    between = centred.T @ centred / sample.classes
    inverse = torch.linalg.pinv(between, hermitian=True, rtol=1e-10)
    b = sample.moments().b
    pair = torch.triu_indices(sample.classes, sample.classes, 1, device=z.device)
    direction = F.normalize(centred, dim=1)
    cosines = (direction @ direction.T)[pair[0], pair[1]]
    distance = b[pair[0]] + b[pair[1]] - 2 * (prototypes @ prototypes.T)[pair[0], pair[1]]  # |mu_c - mu_c'|^2
    cdnv = (2 - b[pair[0]] - b[pair[1]]) / (2 * torch.where(distance > 0, distance, torch.nan))  # V_c = 1 - |mu_c|^2
    spectrum = decompose(torch.linalg.eigvalsh, second).flip(0).clamp(min=0)
    return Collapse(
        nc1=((within * inverse).sum() / sample.classes).item(),
        etf_mean=cosines.mean().item(),
        etf_sd=cosines.std(correction=0).item() if len(cosines) else torch.nan,
        rho=b.clamp(min=0).sqrt().tolist(),
        cdnv=cdnv.nanmean().item(),
        effective_rank=entropy_rank(spectrum.sqrt()).item(),
        spectrum=spectrum.tolist(),
    )

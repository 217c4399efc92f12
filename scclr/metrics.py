"""What can be compared across losses and balances: geometry of unit embeddings. All stay on the device.

Dimensions: B images, V views z1, z2, ... [B, P] with unit rows.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

UNIFORMITY_ROWS = 4096  # more pairs than 4096^2 / 2 would only cost memory


def alignment(*views: Tensor) -> Tensor:
    """E |z1 - z2|^2 over all pairs of views of an image, in [0, 4] (Wang & Isola 2020, eq. 5 with exponent 2)."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in combinations(views, 2)]).mean()


def uniformity(z: Tensor, t: float = 2.0) -> Tensor:
    """log E exp(-t |z_i - z_j|^2), pairs i != j of the first 4096 rows, in [-4 t, 0] (Wang & Isola 2020, eq. 6)."""
    return F.pdist(z[:UNIFORMITY_ROWS]).square().mul(-t).exp().mean().log()


def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of z, in [1, P] (Roy & Vetterli 2007; RankMe)."""
    singular = torch.linalg.svdvals(z.float())
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp()


def pulls(terms: Callable[[Tensor], Sequence[Tensor]], z: Tensor) -> list[Tensor]:
    """The gradient of each of ``terms(z)`` along the sphere, as z [..., P]; its norm says how hard the term moves the
    embeddings.

    The radial part is left out, since the normalisation would remove it.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        gradients = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms(z)]
    unit = F.normalize(z.detach(), dim=-1)
    return [gradient - (gradient * unit).sum(-1, keepdim=True) * unit for gradient in gradients]

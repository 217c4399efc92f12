"""Contrastive losses as attraction + repulsion. One loss per file; each is called as ``loss(z1, z2)``.

Dimensions: B images, two views z1 and z2 [B, P] with unit rows; s = z z^T are cosine similarities of the 2B views.

    A   = mean_i -s_{i,p(i)} / tau                     attraction to the other view p(i) of the same image
    R   = mean_i log sum_{k != i} exp(s_{ik} / tau)    repulsion from all other views
"""

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """Scalars: ``total`` is what is minimised; ``attract`` and ``repel`` are the terms A and R it is made of."""

    total: Tensor
    attract: Tensor
    repel: Tensor

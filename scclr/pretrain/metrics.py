"""Metrics of a batch of embeddings that can be compared across losses and balances. Tensors stay on the device.

Dimensions: B images, V views z1, z2, ... [B, P] with unit rows, P embedding dimensions.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.evaluate.quality import eigenvalues, entropy_rank
from scclr.losses import Loss
from scclr.losses.pairs import widen

MEASURED_VIEWS = 4096  # of a batch: 8 million pairs, and no process is kept waiting for the one that measures
SOFTMAX_ROWS = 1024  # anchors whose softmax is in memory at a time


def embedding_metrics(loss: Loss, z: Tensor, labels: Tensor) -> dict[str, float]:
    """Geometry of the embeddings z [V, B, P] of a step, the size of each loss term's gradient, and the current alpha.

    If the loss has a log-sum-exp form, the ``Admission`` of new features is added. ``labels``, int64 [B], only serve to
    measure. Values that are not finite are left out.

    At most ``MEASURED_VIEWS`` views are measured, those of the first images of the batch, whose order is random. They
    are then the batch of the loss too, so the gradients are those of a batch of that size.
    """
    images = max(2, MEASURED_VIEWS // len(z))
    z, labels = z[:, :images], labels[:images]
    unit = F.normalize(z, dim=2)
    attract, repel = tangent_gradients(lambda views: loss(*views, labels=labels)[1:], z)
    values = {
        "alignment": alignment(*unit),
        "uniformity": uniformity(*unit),
        "effective_rank": effective_rank(unit.flatten(0, 1)),
        "gradient/attract": attract.norm(),
        "gradient/repel": repel.norm(),
        "gradient/cosine": F.cosine_similarity(attract.flatten(), repel.flatten(), dim=0),
    }
    if (form := loss.logsumexp_form()) is not None:
        admission = admission_threshold(unit, form.temperature, loss.alpha, labels=labels, decoupled=form.decoupled)
        admission = admission._replace(q_same=torch.where((labels >= 0).all(), admission.q_same, math.nan))
        values |= {f"admission/{name}": value for name, value in admission._asdict().items()}
    found = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) | {"alpha": float(loss.alpha)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def alignment(*views: Tensor) -> Tensor:
    """E |z1 - z2|^2 over all pairs of views of an image, in [0, 4] (Wang & Isola 2020, eq. 5 with exponent 2)."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in combinations(views, 2)]).mean()


def uniformity(*views: Tensor, t: float = 2.0) -> Tensor:
    """log E exp(-t |z_i - z_j|^2) over pairs of different images, in [-4 t, 0] (Wang & Isola 2020, eq. 6).

    The pairs are those within a view, and the logarithms are averaged over views. Positives of two views would count as
    negatives otherwise.
    """
    return torch.stack([F.pdist(view).square().mul(-t).exp().mean().log() for view in views]).mean()


def effective_rank(z: Tensor) -> Tensor:
    """Effective rank of z [N, P], in [1, P] (Roy & Vetterli 2007): RankMe of a batch of views, without its epsilon.

    The singular values are the roots of the eigenvalues of the Gram matrix, P x P or N x N. Rounding moves these by
    about eps times the largest one, and thus a small singular value by sqrt(eps) times the largest: 1e-8 in float64,
    but 3e-4 in float32. What is not above rounding is taken as 0.
    """
    z = z.double()
    gram = z.T @ z if len(z) >= z.shape[1] else z @ z.T
    return entropy_rank(eigenvalues(gram).sqrt())


def tangent_gradients(terms: Callable[[Tensor], Sequence[Tensor]], z: Tensor) -> list[Tensor]:
    """The gradient of each of ``terms(z)`` on z [..., P], without its component along each row.

    Normalization would remove that component, so the norm of the rest says how strongly a term moves the embeddings.
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        gradients = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in terms(z)]
    unit = F.normalize(z.detach(), dim=-1)
    return [gradient - (gradient * unit).sum(-1, keepdim=True) * unit for gradient in gradients]


class Admission(NamedTuple):
    """Means over the anchors of a batch."""

    r_star: Tensor  # a new feature is learned if it correlates more than this; NaN where the denominator is <= 0
    p_positive: Tensor  # softmax mass p+ on the positives
    repelled: Tensor  # share of positives that the loss pushes apart: p > alpha / ((1 - alpha) (V - 1))
    q_same: Tensor  # share of the negatives' softmax mass that is on the anchor's class; NaN without labels


@torch.no_grad()
def admission_threshold(
    z: Tensor, temperature: float, alpha: float, *, labels: Tensor | None = None, decoupled: bool = False
) -> Admission:
    """How well a new feature must correlate between views for the balanced loss to learn it, from z [V, B, P].

    r* = [alpha s+ - (1 - alpha) <s>_p] / [alpha - (1 - alpha) p+], where s+ is the mean positive similarity and <s>_p
    the mean similarity weighted by an anchor's softmax p over the other views (scclr/theory/README.md, section 5).

    Args:
        z: unit rows.
        labels: int64 [B]; only ``q_same`` reads them.
        decoupled: leave the positives out of the softmax, so that p+ = 0.
    """
    views, images, _ = z.shape
    rows = widen(z.detach()).flatten(0, 1)  # [V B, P]
    row_id = torch.arange(len(rows), device=z.device)
    image, sums = row_id % images, rows.new_zeros(5)
    for index in row_id.split(SOFTMAX_ROWS):
        similarity = rows[index] @ rows.T  # [b, V B]
        left_out = image[index].unsqueeze(1) == image if decoupled else index.unsqueeze(1) == row_id
        p = (similarity / temperature).masked_fill(left_out, -torch.inf).softmax(1)
        positive = (index.unsqueeze(1) + images * torch.arange(1, views, device=z.device)) % len(rows)  # [b, V - 1]
        share, weighted = p.gather(1, positive), (p * similarity).sum(1)
        repelled = (1 - alpha) * (views - 1) * share > alpha
        p.scatter_(1, positive, 0)
        same = torch.full_like(p, math.nan) if labels is None else labels[image[index]].unsqueeze(1) == labels[image]
        columns = (
            similarity.gather(1, positive).mean(1), weighted, share.sum(1), repelled.to(p.dtype).mean(1),
            (p * same).sum(1) / p.sum(1),
        )  # fmt: skip
        sums += torch.stack([column.sum() for column in columns])
    s_positive, s_weighted, p_positive, repelled_share, q_same = sums / len(rows)
    denominator = alpha - (1 - alpha) * p_positive
    r_star = (alpha * s_positive - (1 - alpha) * s_weighted) / denominator
    return Admission(torch.where(denominator > 0, r_star, math.nan), p_positive, repelled_share, q_same)

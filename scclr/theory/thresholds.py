"""What a balance alpha lets into the embeddings: local stability of the balanced loss in a feature's correlation r.

A feature x (variance one over images and views) has r = Corr(x(T X), x(T' X)) over augmentations T. lam = (1 - alpha) /
alpha. These are statements about the first moments of a feature's growth, at a given state (README.md, section 5):

    near z = const, it grows iff                  r > 1 - lam                      alpha_col = 1 / (2 - r_max)
    next to what has been learned, iff            r > r* = [alpha s+ - (1 - alpha) <s>_p] / [alpha - (1 - alpha) p+]
    next to collapsed classes, only if            alpha < alpha_c = s~ / (s~ + 1 - r)

Dimensions: N images, M views, D features; B images in a batch, V views of each, P embedding dimensions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.losses.pairs import widen

ROWS = 1024  # rows of a softmax at a time


@torch.no_grad()
def augmentation_correlations(
    *views: Tensor, labels: Tensor | None = None, ridge: float = 1e-4, components: int = 128
) -> Tensor:
    """Canonical correlations between views of the same images, falling, float64 [min(D, components)].

    Stationary values over v of Corr(<v, h1>, <v, h2>), h1 and h2 two of the views [N, D]: eigenvalues of the covariance
    between different views relative to that within views, which gets ``ridge`` times its mean eigenvalue, among the
    leading principal components. Directions come from one half of the images and correlations from the other, both
    ways: in the images of the fit, features correlate by chance alone. With two views of 1,024 images this loses more
    than it should (digits, D = 128: 0.52, where the fit says 0.73); with eight the two agree (0.66 and 0.69).

    Args:
        labels: int64 [N]; then of what is left when each feature's class means are taken off, the instance features.

    Raises:
        ValueError: fewer than two views or four images, views of different shapes, or values that are not finite.
    """
    shapes = {tuple(view.shape) for view in views}
    if len(views) < 2 or len(shapes) > 1 or views[0].ndim != 2 or len(views[0]) < 4:
        raise ValueError(
            f"views are {[list(view.shape) for view in views]}: give two or more [N, D] of 4 images or more"
        )
    h = torch.stack(views, 1).double()  # [N, M, D]
    if not bool(h.isfinite().all()):
        raise ValueError("features are not finite")
    if labels is not None:
        _, index, count = labels.unique(return_inverse=True, return_counts=True)
        sums = h.new_zeros(len(count), h.shape[2]).index_add_(0, index, h.mean(1))
        h = h - (sums / count.unsqueeze(1))[index].unsqueeze(1)
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0)).to(h.device)  # data may be sorted
    halves = [_covariances(h[half]) for half in order.chunk(2)]
    found = []
    for (within, between), (held_within, held_between) in (halves, halves[::-1]):
        size = within.diagonal().mean()
        if size <= 0:  # constant features do not correlate
            return h.new_zeros(min(components, h.shape[2]))
        level = ridge * size * torch.eye(len(within), dtype=h.dtype, device=h.device)
        scale, basis = torch.linalg.eigh(within + level)
        whiten = (basis * scale.rsqrt())[:, -components:]
        _, axes = torch.linalg.eigh(whiten.T @ between @ whiten)
        v = whiten @ axes.flip(1)  # a column a direction
        found.append(((held_between @ v) * v).sum(0) / (((held_within + level) @ v) * v).sum(0))
    return ((found[0] + found[1]) / 2).sort(descending=True).values


def _covariances(h: Tensor) -> tuple[Tensor, Tensor]:
    """(within a view, between different views), each [D, D], of h [N, M, D] with one mean."""
    n, m, _ = h.shape
    h = h - h.mean((0, 1))
    within, mean = torch.einsum("nmd,nme->de", h, h) / (n * m), h.mean(1)
    return within, (m * mean.T @ mean / n - within) / (m - 1)


def collapse_threshold(r_max: float) -> float:
    """alpha_col = 1 / (2 - r_max): above it the constant embedding is stable, at any temperature."""
    return 1 / (2 - r_max)


def class_threshold(classes: int, temperature: float, r: float) -> float:
    """alpha_c: above it a simplex of ``classes`` points, equal in share, keeps features of correlation r out.

    s~ = q - (1 - q) / (C - 1), q = e^(1/tau) / (e^(1/tau) + (C - 1) e^(-1 / ((C - 1) tau))).

    Raises:
        ValueError: fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: a simplex has two or more")
    others = classes - 1
    q = 1 / (1 + others * math.exp(-(1 + 1 / others) / temperature))
    hardness = q - (1 - q) / others
    return min(1.0, max(0.0, hardness / (hardness + 1 - r))) if hardness + 1 - r > 0 else 1.0


def misalignment_onset(images: int, temperature: float) -> float:
    """alpha_mis: below it the best embedding of a batch of ``images`` two-view images keeps positives apart.

    1 / (1 + lam), lam = D / ((D + 1) p - 1), D = 2 N - 2, p = e^(1/tau) / (e^(1/tau) + D e^(-2 / (D tau))). The
    decoupled loss has no such onset. 0 where positives stay together at every alpha.

    Raises:
        ValueError: fewer than two images.
    """
    if images < 2:
        raise ValueError(f"images={images}: a batch has two or more")
    d = 2 * images - 2
    p = 1 / (1 + d * math.exp(-(1 + 2 / d) / temperature))
    excess = (d + 1) * p - 1
    return excess / (excess + d) if excess > 0 else 0.0


class Admission(NamedTuple):
    """Means over the anchors of a batch, on its device."""

    r_star: Tensor  # a new feature is learned iff its correlation is above; NaN where the denominator is not positive
    p_positive: Tensor  # softmax mass on the positives
    repelled: Tensor  # share of positives that the loss pushes apart: p > alpha / (1 - alpha), over V - 1
    q_same: Tensor  # softmax mass on the own class, of the negatives' mass; NaN without labels


@torch.no_grad()
def admission_threshold(
    z: Tensor, temperature: float | Tensor, alpha: float, *, labels: Tensor | None = None, decoupled: bool = False
) -> Admission:
    """r* = [alpha s+ - (1 - alpha) <s>_p] / [alpha - (1 - alpha) p+] from the softmax of a batch z [V, B, P].

    Rows are of unit length. s+ is the mean positive similarity, <s>_p the mean similarity weighted by an anchor's
    softmax over the other views. ``decoupled`` leaves the positives out of the softmax, so p+ = 0. ``labels``, int64
    [B], are only measured.
    """
    views, images, _ = z.shape
    rows = widen(z.detach()).flatten(0, 1)  # [V B, P]
    every = torch.arange(len(rows), device=z.device)
    image, sums = every % images, rows.new_zeros(5)
    for index in every.split(ROWS):
        similarity = rows[index] @ rows.T  # [b, V B]
        left_out = image[index].unsqueeze(1) == image if decoupled else index.unsqueeze(1) == every
        p = (similarity / temperature).masked_fill(left_out, -torch.inf).softmax(1)
        positive = (index.unsqueeze(1) + images * torch.arange(1, views, device=z.device)) % len(rows)  # [b, V - 1]
        share, hardness = p.gather(1, positive), (p * similarity).sum(1)
        repelled = (1 - alpha) * (views - 1) * share > alpha
        p.scatter_(1, positive, 0)
        same = torch.full_like(p, math.nan) if labels is None else labels[image[index]].unsqueeze(1) == labels[image]
        columns = (
            similarity.gather(1, positive).mean(1), hardness, share.sum(1), repelled.to(p.dtype).mean(1),
            (p * same).sum(1) / p.sum(1),
        )  # fmt: skip
        sums += torch.stack([column.sum() for column in columns])
    alike, hardness, p_positive, pushed, q_same = sums / len(rows)
    denominator = alpha - (1 - alpha) * p_positive
    r_star = (alpha * alike - (1 - alpha) * hardness) / denominator
    return Admission(torch.where(denominator > 0, r_star, math.nan), p_positive, pushed, q_same)

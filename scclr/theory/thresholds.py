"""Thresholds of alpha: for which balance a feature grows, by its correlation r between augmented views.

A feature x of unit variance has r = Corr(x(T X), x(T' X)) over augmentations T, T'. With lam = (1 - alpha) / alpha, the
balanced loss falls as the feature is added to given embeddings if (README.md, section 5)

    at constant embeddings                    r > 1 - lam                  so these are stable above alpha_col
    next to what has been learned             r > r*                       scclr.pretrain.metrics.admission_threshold
    next to classes that are single points    alpha < alpha_c              for a feature within classes

These are proved for the losses that have a ``LogSumExpForm``. Of others nothing is said.

Dimensions: N images, M views, V views in a training step, D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.losses import LogSumExpForm
from scclr.run.machine import decompose
from scclr.theory.sample import LEAST_IMAGES


class Edges(NamedTuple):
    """Where the behaviour of a training changes with alpha."""

    alpha_col: float  # above it embeddings collapse to a point
    alpha_c: float | None  # above it classes that are points keep out features within classes
    alpha_mis: float  # below it the best embedding separates positives; 0 if it never does
    alpha_mis_exact: bool  # False in fewer than N - 1 dimensions, where the onset may lie lower


def edges(
    form: LogSumExpForm,
    *,
    r_max: float,
    images: int,
    views: int,
    width: int,
    classes: int = 0,
    r_within: float | None = None,
) -> Edges:
    """The thresholds of a loss of this ``form``.

    A training step has ``views`` views of ``images`` images, and embeddings have ``width`` dimensions.

    Args:
        r_max: largest correlation of a feature between views.
        r_within: the same of features within ``classes`` classes; without it there is no alpha_c.

    Raises:
        ValueError: as ``class_threshold`` and ``misalignment_onset``.
    """
    onset = misalignment_onset(images, form.temperature, views=views, decoupled=form.decoupled)
    alpha_c = None if r_within is None else class_threshold(classes, form.temperature, r_within)
    return Edges(collapse_threshold(r_max), alpha_c, onset, form.decoupled or width >= images - 1)


@torch.no_grad()
def augmentation_correlations(
    h: Tensor, labels: Tensor | None = None, *, ridge: float = 1e-4, components: int = 128
) -> Tensor:
    """Canonical correlations between the views of h [N, M, D], in descending order, float64 [min(D, components)].

    These are the stationary values over v of Corr(<v, h1>, <v, h2>), where h1 and h2 are two views of an image:
    eigenvalues of the covariance between different views relative to the covariance within views. The latter gets
    ``ridge`` times its mean eigenvalue, and both are restricted to the leading principal components.

    Directions are fitted on one half of the images and correlations are measured on the other, both ways, since on the
    images of the fit features correlate by chance alone. With two views of 1,024 images this underestimates (digits,
    D = 128: 0.52, against 0.73 on the images of the fit); with eight views the two agree (0.66 and 0.69).

    Args:
        labels: int64 [N]; if given, class means are subtracted first, which leaves the features within classes.

    Raises:
        ValueError: h is not [N, M, D] with four images and two views or more, or has values that are not finite.
    """
    if h.ndim != 3 or h.shape[1] < 2 or len(h) < LEAST_IMAGES:
        raise ValueError(f"h is {list(h.shape)}: give [N, M, D] with {LEAST_IMAGES} images and 2 views or more")
    h = h.double()
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
        mean_eigenvalue = within.diagonal().mean()
        if mean_eigenvalue <= 0:  # constant features do not correlate
            return h.new_zeros(min(components, h.shape[2]))
        regularizer = ridge * mean_eigenvalue * torch.eye(len(within), dtype=h.dtype, device=h.device)
        scale, basis = decompose(torch.linalg.eigh, within + regularizer)
        whiten = (basis * scale.rsqrt())[:, -components:]
        _, axes = decompose(torch.linalg.eigh, whiten.T @ between @ whiten)
        v = whiten @ axes.flip(1)  # one direction per column
        found.append(((held_between @ v) * v).sum(0) / (((held_within + regularizer) @ v) * v).sum(0))
    return ((found[0] + found[1]) / 2).sort(descending=True).values


def _covariances(h: Tensor) -> tuple[Tensor, Tensor]:
    """Covariances of h [N, M, D] within a view and between different views, each [D, D], around one common mean."""
    n, m, _ = h.shape
    h = h - h.mean((0, 1))
    within, mean = torch.einsum("nmd,nme->de", h, h) / (n * m), h.mean(1)
    return within, (m * mean.T @ mean / n - within) / (m - 1)


def collapse_threshold(r_max: float) -> float:
    """alpha_col = 1 / (2 - r_max): above it the constant embedding minimizes the loss, at every temperature.

    This holds for large batches, where r_max is the largest correlation among all functions that the encoder can be.
    Below it the constant is not even a local minimum. ``r_max`` of given features is at most that of all functions.
    """
    return 1 / (2 - r_max)


def class_threshold(classes: int, temperature: float, r: float) -> float:
    """alpha_c = s~ / (s~ + 1 - r): above it classes that are the points of a simplex keep a feature out.

    ``r`` is the feature's correlation between views; it does not depend on the class. Classes have equal shares,
    s~ = q - (1 - q) / (C - 1) and q = e^(1/tau) / (e^(1/tau) + (C - 1) e^(-1 / ((C - 1) tau))).

    Raises:
        ValueError: fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: a simplex has two or more")
    others = classes - 1
    q = 1 / (1 + others * math.exp(-(1 + 1 / others) / temperature))
    hardness = q - (1 - q) / others  # s~
    return min(1.0, max(0.0, hardness / (hardness + 1 - r))) if hardness + 1 - r > 0 else 1.0


def misalignment_onset(images: int, temperature: float, *, views: int = 2, decoupled: bool = False) -> float:
    """alpha_mis: below it the best embedding of a batch of N = ``images`` with V = ``views`` views separates positives.

    alpha_mis = E / (E + D) with D = V (N - 1) negatives, E = (D + V - 1) p - (V - 1) and the positives' softmax mass
    p = (V - 1) e^(1/tau) / ((V - 1) e^(1/tau) + D e^(-V / (D tau))) at the simplex of N points. It is 0 if positives
    coincide at every alpha, as they do with the decoupled loss.

    The simplex needs N - 1 dimensions. In fewer, negatives are closer to each other, and the onset may lie lower.

    Raises:
        ValueError: fewer than two images or views.
    """
    if images < 2 or views < 2:
        raise ValueError(f"images={images}, views={views}: a batch has two or more of each")
    if decoupled:
        return 0.0
    d, positives = views * (images - 1), views - 1
    p = positives / (positives + d * math.exp(-(1 + views / d) / temperature))
    excess = (d + positives) * p - positives
    return excess / (excess + d) if excess > 0 else 0.0

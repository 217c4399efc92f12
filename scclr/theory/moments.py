"""The prototype representation bias: how far an image's mean embedding is from the prototype of its class.

Dimensions: n images, M views of each, d embedding dimensions, C classes; z [n, M, d] has unit rows.

    mu_x = E f(T(x)) over augmentations T,    mu_y = E[mu_x | class y],    mu = E mu_x

    B2    = E |mu_x - mu_y|^2 = E |mu_x|^2 - E |mu_y|^2      the squared bias
    S_B   = E |mu_y - mu|^2                                  variance between classes
    V_aug = E |f(T(x)) - mu_x|^2 = 1 - E |mu_x|^2            variance between the views of an image
    1     = |mu|^2 + S_B + B2 + V_aug                        because rows have unit length

Every squared mean is estimated by the mean product of *different* views, or of different images. Such a U-statistic is
unbiased at any M >= 2, whereas the plug-in value of B2 is too large by about V_aug / M.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scclr.theory.sample import Estimate, Sample

COLLAPSED = 0.9  # above this |mu|^2, B2 and S_B are both small, and their ratio is mostly noise


@dataclass(frozen=True)
class Bias:
    """The bias and the other parts of the variance: ``mean_norm2 + s_b + b2 + v_aug`` is 1."""

    b2: Estimate  # unbiased, so it may be negative where the bias is small
    v_aug: Estimate
    s_b: Estimate
    mean_norm2: Estimate  # |mu|^2; near 1, all embeddings are the same
    i_b: Estimate  # B2 / (B2 + S_B); NaN where mean_norm2 > 0.9
    b1: Estimate  # E |mu_x - mu_y|, between B2 and sqrt(B2); extrapolated from M and M / 2 views to infinitely many
    by_class: list[Estimate]  # B2 of each class; NaN for a dropped one
    dropped: list[int]  # classes with one image
    images: int
    views: int


@torch.no_grad()
def prototype_bias(z: Tensor, labels: Tensor, *, population: bool = False) -> Bias:
    """The bias of z [n, M, d] with int64 labels [n], with standard errors; O(n + C d) memory beyond z.

    A U-statistic has the standard error of the mean of its influence. Image i has the influence
    h_i = a_i - 2 <zb_i, (T_c - zb_i) / (n_c - 1)> + b_c on B2, where T_c is the sum of the n_c mean views zb of its
    class c. The mean of h_i is B2.

    Raises:
        ValueError: as ``Sample``.
    """
    sample = Sample(z, labels, population=population)
    a, b_class, share, g = sample.moments()
    b = share @ b_class
    n, k = sample.images, sample.sums.n[0]
    influences, b1 = influence(sample), _b1(sample)  # [n, 3], [n]
    deviations = influences - torch.stack([a, b, g])
    covariance = deviations.T @ deviations / (n * max(1, n - 1)) * sample.own

    def estimate(value: Tensor, *weights: float) -> Estimate:
        w = torch.tensor(weights, dtype=torch.float64, device=covariance.device)
        return Estimate(value.item(), (w @ covariance @ w).clamp(min=0).sqrt().item())

    i_b = Estimate(math.nan, math.nan)
    if not bool((g > COLLAPSED) | (a <= g)):
        gradient = (b - g) / (a - g) ** 2, -1 / (a - g), (a - b) / (a - g) ** 2  # of the ratio by a, b and g
        i_b = estimate((a - b) / (a - g), *(float(slope) for slope in gradient))
    b1_error = (b1.var(correction=0) / max(1, n - 1)).sqrt() * sample.own
    b2_class = sample.sums.pairs[0] / k - b_class  # [C]
    within = influences[:, 0] - influences[:, 1] - b2_class[sample.labels]
    squares = torch.zeros_like(b2_class).index_add_(0, sample.labels, within.square())
    by_class = b.new_full((len(sample.kept), 2), math.nan)
    by_class[sample.kept] = torch.stack([b2_class, (squares / (k * (k - 1).clamp(min=1))).sqrt() * sample.own], 1)
    return Bias(
        b2=estimate(a - b, 1, -1, 0),
        v_aug=estimate(1 - a, 1, 0, 0),
        s_b=estimate(b - g, 0, 1, -1),
        mean_norm2=estimate(g, 0, 0, 1),
        i_b=i_b,
        b1=Estimate(b1.mean().item(), b1_error.item()),
        by_class=[Estimate(*pair) for pair in by_class.tolist()],
        dropped=sample.dropped,
        images=n,
        views=sample.views,
    )


def influence(sample: Sample) -> Tensor:
    """The influence of each image on a, b and g, [n, 3]. Its means are a, b and g."""
    _, b, _, g = sample.moments()
    count, total = sample.sums.n[0], sample.sums.total[0]
    parts = []
    for z, labels, _ in sample.chunks():
        zb = z.mean(1)
        same_class = (total[labels] - sample.own * zb) / (count[labels] - sample.own).unsqueeze(1)
        any_class = (total.sum(0) - sample.own * zb) / (sample.images - sample.own)
        by_b, by_g = 2 * (zb * same_class).sum(1) - b[labels], 2 * (zb * any_class).sum(1) - g
        parts.append(torch.stack([sample.squared_mean(z), by_b, by_g], 1))
    return torch.cat(parts)


def _b1(sample: Sample) -> Tensor:
    """|mu_x - mu_y| of each image, [n].

    The value from M views is too large by O(1 / M). Twice this value minus the one from M / 2 views is by O(1 / M^2).
    """
    prototypes, half = sample.sums.total[0] / sample.sums.n[0].unsqueeze(1), sample.views // 2
    parts = []
    for z, labels, _ in sample.chunks():
        to_class = z - prototypes[labels].unsqueeze(1)  # [b, M, d]
        if sample.own:
            halves = to_class[:, :half], to_class[:, half : 2 * half]
            by_half = sum(x.mean(1).norm(dim=1) for x in halves) / 2
            parts.append(2 * to_class[:, : 2 * half].mean(1).norm(dim=1) - by_half)
        else:
            parts.append(to_class.mean(1).norm(dim=1))
    return torch.cat(parts)

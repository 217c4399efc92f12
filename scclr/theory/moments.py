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
from collections.abc import Iterator
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
    b1: Estimate  # E |mu_x - mu_y|, extrapolated from M and M / 2 views to infinitely many
    b1_interval: tuple[float, float]  # B2 <= B1 <= sqrt(B2)
    by_class: list[Estimate]  # B2 of each class; NaN for a dropped one
    dropped: list[int]  # classes with one image
    images: int
    views: int


@torch.no_grad()
def prototype_bias(z: Tensor, labels: Tensor, *, population: bool = False) -> Bias:
    """The bias of z [n, M, d] with int64 labels [n], with standard errors; O(C d) memory beyond z.

    A U-statistic has the standard error of the mean of its influence. Image i has the influence
    h_i = a_i - 2 <zb_i, (T_c - zb_i) / (n_c - 1)> + b_c on B2, where T_c is the sum of the n_c mean views zb of its
    class c. The mean of h_i is B2.

    Raises:
        ValueError: as ``Sample``.
    """
    sample = Sample(z, labels, population=population)
    a, b_class, share, g = sample.moments()
    b = share @ b_class
    squares, by_class, b1_sum, b1_square = _deviations(sample)
    n, k = sample.images, sample.sums.n[0]
    covariance = squares / (n * max(1, n - 1)) * sample.own

    def estimate(value: Tensor, *weights: float) -> Estimate:
        w = torch.tensor(weights, dtype=torch.float64, device=covariance.device)
        return Estimate(value.item(), (w @ covariance @ w).clamp(min=0).sqrt().item())

    i_b = Estimate(math.nan, math.nan)
    if not bool((g > COLLAPSED) | (a <= g)):
        gradient = (b - g) / (a - g) ** 2, -1 / (a - g), (a - b) / (a - g) ** 2  # of the ratio by a, b and g
        i_b = estimate((a - b) / (a - g), *(float(slope) for slope in gradient))
    b1 = b1_sum / n
    b1_error = ((b1_square / n - b1**2).clamp(min=0) / max(1, n - 1)).sqrt() * sample.own
    b2_of_class = (sample.sums.pairs[0] / k - b_class).tolist()
    variance_of_class = (by_class / (k * (k - 1).clamp(min=1))).tolist()
    kept = iter(zip(b2_of_class, variance_of_class, strict=True))
    classes = [next(kept) if keep else (math.nan, math.nan) for keep in sample.kept.tolist()]
    bias = (a - b).item()
    return Bias(
        b2=estimate(a - b, 1, -1, 0),
        v_aug=estimate(1 - a, 1, 0, 0),
        s_b=estimate(b - g, 0, 1, -1),
        mean_norm2=estimate(g, 0, 0, 1),
        i_b=i_b,
        b1=Estimate(b1.item(), b1_error.item()),
        b1_interval=(bias, math.sqrt(max(0.0, bias))),
        by_class=[Estimate(value, math.sqrt(variance) * sample.own) for value, variance in classes],
        dropped=sample.dropped,
        images=n,
        views=sample.views,
    )


def influence(sample: Sample) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Part by part, each image's influence on a, b and g, [b, 3], its label and its z. The means are a, b and g."""
    _, b, _, g = sample.moments()
    count, total = sample.sums.n[0], sample.sums.total[0]
    for z, labels in sample.chunks():
        zb = z.mean(1)
        same_class = (total[labels] - sample.own * zb) / (count[labels] - sample.own).unsqueeze(1)
        any_class = (total.sum(0) - sample.own * zb) / (sample.images - sample.own)
        by_b, by_g = 2 * (zb * same_class).sum(1) - b[labels], 2 * (zb * any_class).sum(1) - g
        yield torch.stack([sample.squared_mean(z), by_b, by_g], 1), labels, z


def _deviations(sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over images: products of the deviations of the influences on a, b, g from their means, [3, 3]; squared
    deviations of the influence on B2 within each class, [C]; the image's B1; and its square.

    B1 from M views is too large by O(1 / M). Twice this value minus the one from M / 2 views is by O(1 / M^2).
    """
    a, b_class, share, g = sample.moments()
    count, total, _, pairs = (s[0] for s in sample.sums)
    centre = torch.stack([a, share @ b_class, g])
    prototype, b2 = total / count.unsqueeze(1), pairs / count - b_class
    half = sample.views // 2
    sums = torch.zeros(9 + sample.classes + 2, dtype=torch.float64, device=total.device)
    for values, labels, z in influence(sample):
        centred = values - centre
        within = values[:, 0] - values[:, 1] - b2[labels]
        if sample.own:
            halves = (z[:, :half], z[:, half : 2 * half])
            b1 = 2 * _distance(z[:, : 2 * half], prototype[labels])
            b1 -= sum(_distance(part, prototype[labels]) for part in halves) / 2
        else:
            b1 = _distance(z, prototype[labels])
        sums[:9] += (centred.T @ centred).flatten()
        sums[9:-2].index_add_(0, labels, within.square())
        sums[-2:] += torch.stack([b1.sum(), b1.square().sum()])
    return sums[:9].view(3, 3), sums[9:-2], sums[-2], sums[-1]


def _distance(z: Tensor, prototype: Tensor) -> Tensor:
    """|mean view - prototype|, [b], of z [b, M, d] and prototypes [b, d]."""
    return (z.mean(1) - prototype).norm(dim=1)

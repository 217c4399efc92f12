"""Alignment and uniformity on the unit sphere."""

import math

import torch

from scclr.losses.anchors import Anchors
from scclr.losses.base import Loss, LossTerms, balance, check_positive
from scclr.losses.pairs import row_logsumexp


class AlignUniformLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is L_align + L_uniform (Wang & Isola 2020, eqs. 5 and 6).

    A = mean |z_i - z_p|^2;    R = mean over views of log mean_{i != k} exp(-t |z_i - z_k|^2), i and k in one view.

    On unit rows |z_i - z_k|^2 = 2 - 2 s_ik. R is the logarithm of a mean over all images and not a mean over anchors,
    so every process computes all of it.

    Raises:
        ValueError: if alpha is outside [0, 1] or t outside [1e-6, 1e6]; on call, as ``Loss``.
    """

    least_images = 2

    def __init__(self, *, alpha: float, t: float) -> None:
        super().__init__(alpha)
        check_positive(t=t)
        self.t = t

    def terms(self, anchors: Anchors) -> LossTerms:
        attract = 2 - 2 * anchors.positives().mean()
        pairs = anchors.images * (anchors.images - 1)
        # exp(-t |z_i - z_k|^2) = exp(2 t s_ik) exp(-2 t)
        sums = [row_logsumexp(view, 1 / (2 * self.t)).logsumexp(0) for view in anchors.all_views]
        return balance(self.alpha, attract, torch.stack(sums).mean() - 2 * self.t - math.log(pairs))

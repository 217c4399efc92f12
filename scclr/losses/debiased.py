"""The debiased contrastive loss: negatives corrected for those that share the anchor's class."""

import math

import torch
from torch import Tensor

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive, check_range


class DebiasedLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R) (Chuang et al. 2020, with M = 1; alpha = 0.5 is theirs).

    A = mean_i mean_p -s_ip / tau;    R = mean_i mean_p log(exp(s_ip / tau) + K g_ip), with K views of other images and

        g_ip = max((mean_k exp(s_ik / tau) - class_prior exp(s_ip / tau)) / (1 - class_prior), exp(-1 / tau))

    the estimated mean over true negatives. ``class_prior`` is the probability that another image has the anchor's
    class. ``class_prior = 0`` is NT-Xent of two views.

    Raises:
        ValueError: if alpha is outside [0, 1], the temperature outside [1e-6, 1e6], or class_prior outside [0, 0.999];
            on call, for a batch of one image.
    """

    least_images = 2

    def __init__(self, *, alpha: float, temperature: float, class_prior: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        check_range(0, 0.999, class_prior=class_prior)
        self.alpha, self.temperature, self.class_prior = alpha, temperature, class_prior

    def terms(self, anchors: Anchors) -> LossTerms:
        others = (anchors.images - 1) * len(anchors.local_views)  # K
        positives = anchors.positives() / self.temperature  # [V - 1, VB]
        mean = anchors.negatives(self.temperature) - math.log(others)  # [VB]
        negatives = true_negatives(mean, positives, self.class_prior, self.temperature)  # [V - 1, VB]
        repel = torch.logaddexp(positives, negatives + math.log(others))
        return balance(self.alpha, -positives.mean(), repel.mean())


def true_negatives(mean: Tensor, positives: Tensor, class_prior: float, temperature: float) -> Tensor:
    """log max((exp(mean) - class_prior exp(positives)) / (1 - class_prior), exp(-1 / temperature)); no overflow."""
    floor = torch.zeros_like(positives) - 1 / temperature
    if class_prior == 0:
        return torch.maximum(mean.expand_as(positives), floor)
    share = positives - mean + math.log(class_prior)  # log of the share of the mean that is subtracted
    left = share < -torch.finfo(share.dtype).eps  # something is left of the mean
    rest = torch.log1p(-torch.where(left, share, -1).exp())  # the -1 keeps the gradient of the other branch finite
    return torch.where(left, torch.maximum(mean + rest - math.log1p(-class_prior), floor), floor)

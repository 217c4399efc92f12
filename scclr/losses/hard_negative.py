"""The hard-negative loss: negatives weighted by how similar they are, and corrected for their class."""

import math

import torch
from torch import Tensor

from scclr.losses.anchors import Anchors
from scclr.losses.base import LossTerms, TemperatureLoss, balance, check_range


class HardNegativeLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R) (Robinson et al. 2021; alpha = 0.5 is theirs).

    A = mean_i mean_p -s_ip / tau;    R = mean_i mean_p log(exp(s_ip / tau) + K g_ip), with K views of other images and

        g_ip = max((m_i - class_prior exp(s_ip / tau)) / (1 - class_prior), exp(-1 / tau))
        m_i  = sum_k exp((1 + hardness) s_ik / tau) / sum_k exp(hardness s_ik / tau)

    m_i is a mean over all negatives that gives more weight to the similar ones, and g_ip the estimated mean over true
    negatives. ``class_prior`` is the probability that another image has the anchor's class.

    Raises:
        ValueError: as ``TemperatureLoss``; if class_prior is outside [0, 0.999] or hardness outside [0, 1e6].
    """

    least_images = 2

    def __init__(self, *, alpha: float, temperature: float, class_prior: float, hardness: float) -> None:
        super().__init__(alpha=alpha, temperature=temperature)
        check_range(0, 0.999, class_prior=class_prior)
        check_range(0, 1e6, hardness=hardness)
        self.class_prior, self.hardness = class_prior, hardness

    def terms(self, anchors: Anchors) -> LossTerms:
        log_others = math.log((anchors.images - 1) * len(anchors.local_views))  # log K
        positives = anchors.positives() / self.temperature  # [V - 1, VB]
        weights = anchors.negatives(self.temperature / self.hardness) if self.hardness > 0 else log_others
        mean = anchors.negatives(self.temperature / (1 + self.hardness)) - weights  # [VB]
        negatives = true_negatives(mean, positives, self.class_prior, self.temperature)  # [V - 1, VB]
        repel = torch.logaddexp(positives, negatives + log_others)
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

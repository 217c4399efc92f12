"""The hard-negative loss: negatives weighted by how similar they are, and corrected for their class."""

import math

import torch

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive, check_range
from scclr.losses.debiased import true_negatives


class HardNegativeLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R) (Robinson et al. 2021; alpha = 0.5 is theirs).

    This is the debiased loss with another mean over the K negatives, which gives more weight to the similar ones:

        sum_k exp((1 + hardness) s_ik / tau) / sum_k exp(hardness s_ik / tau)

    ``hardness = 0`` is the debiased loss.

    Raises:
        ValueError: if alpha is outside [0, 1], the temperature outside [1e-6, 1e6], class_prior outside [0, 0.999], or
            hardness outside [0, 1e6]; on call, for a batch of one image.
    """

    least_images = 2

    def __init__(self, *, alpha: float, temperature: float, class_prior: float, hardness: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        check_range(0, 0.999, class_prior=class_prior)
        check_range(0, 1e6, hardness=hardness)
        self.alpha, self.temperature, self.class_prior, self.hardness = alpha, temperature, class_prior, hardness

    def terms(self, anchors: Anchors) -> LossTerms:
        log_others = math.log((anchors.images - 1) * len(anchors.local_views))  # log K
        positives = anchors.positives() / self.temperature  # [V - 1, VB]
        weights = anchors.negatives(self.temperature / self.hardness) if self.hardness > 0 else log_others
        mean = anchors.negatives(self.temperature / (1 + self.hardness)) - weights  # [VB]
        negatives = true_negatives(mean, positives, self.class_prior, self.temperature)  # [V - 1, VB]
        repel = torch.logaddexp(positives, negatives + log_others)
        return balance(self.alpha, -positives.mean(), repel.mean())

"""The negatives-only supervised contrastive loss: only views of other classes repel."""

import torch

from scclr.losses.anchors import Anchors
from scclr.losses.base import LossTerms, TemperatureLoss, balance


class NSCLLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R), which contains both losses of Luthra et al. (2025, arXiv 2506.04411).

    A = mean_i mean_p -s_ip / tau;    R = mean_i log sum_k exp(s_ik / tau), where k are the views of other classes

    Their equation and their code differ. The equation attracts each view to all V views of its image, itself included.
    It is (2V - 1) / (2V) total - 1 / (V tau) at alpha = (V - 1) / (2V - 1), which is 1/3 for two views. The code has
    the positive in the denominator. It is total at alpha = 0.5 with ``positive_in_denominator``, where

        R = mean_i mean_p log(exp(s_ip / tau) + sum_k exp(s_ik / tau))

    Without it, alpha = 0.5 is the decoupled loss whose negatives leave out the anchor's class, and R is -inf for a
    batch of one class. The decoupled loss is larger by 2 (1 - alpha) mean_i -log(1 - q_i), where q_i is the mass that
    its softmax puts on the anchor's class. The code's default temperature is 0.5.

    Raises:
        ValueError: as ``TemperatureLoss``.
    """

    supervised = True
    least_images = 2

    def __init__(self, *, alpha: float, temperature: float, positive_in_denominator: bool = False) -> None:
        super().__init__(alpha=alpha, temperature=temperature)
        self.positive_in_denominator = positive_in_denominator

    def terms(self, anchors: Anchors) -> LossTerms:
        repel = anchors.negatives(self.temperature, label=anchors.label)  # [VB]
        if not self.positive_in_denominator:
            attract = -anchors.positives().mean() / self.temperature
            return balance(self.alpha, attract, repel.mean())
        positives = anchors.positives() / self.temperature  # [V - 1, VB]
        return balance(self.alpha, -positives.mean(), torch.logaddexp(positives, repel).mean())

"""The negatives-only supervised contrastive loss: only views of other classes repel."""

from scclr.losses import Anchors, LossTerms, TemperatureLoss, balance


class NSCLLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R) (Luthra et al. 2025, arXiv 2506.04411; alpha = 0.5 is theirs).

    A = mean_i mean_p -s_ip / tau;    R = mean_i log sum_k exp(s_ik / tau), where k are the views of other classes.

    The decoupled loss is larger by 2 (1 - alpha) mean_i -log(1 - q_i), where q_i is the mass that its softmax puts on
    the anchor's class. R is -inf for a batch of one class.
    """

    supervised = True
    least_images = 2

    def terms(self, anchors: Anchors) -> LossTerms:
        attract = -anchors.positives().mean() / self.temperature
        repel = anchors.negatives(self.temperature, label=anchors.label).mean()
        return balance(self.alpha, attract, repel)

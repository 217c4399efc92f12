"""The decoupled contrastive loss: NT-Xent without the positive in the denominator."""

from scclr.losses.anchors import Anchors
from scclr.losses.base import LogSumExpForm, LossTerms, TemperatureLoss, balance


class DecoupledLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of Yeh et al. (2022, arXiv 2110.06848).

    A = mean_i mean_p -s_ip / tau;    R = mean_i log sum_k exp(s_ik / tau), where k are the views of other images.

    The attraction between positives has a constant gradient. That of NT-Xent fades as positives become easy.

    The authors' code (raminnakhli/Decoupled-Contrastive-Learning) adds the means of the two directions, which is twice
    this loss; its default temperature is 0.1.
    """

    least_images = 2

    def logsumexp_form(self) -> LogSumExpForm:
        return LogSumExpForm(self.temperature, decoupled=True)

    def terms(self, anchors: Anchors) -> LossTerms:
        attract = -anchors.positives().mean() / self.temperature
        return balance(self.alpha, attract, anchors.negatives(self.temperature).mean())

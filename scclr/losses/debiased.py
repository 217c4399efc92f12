"""The debiased contrastive loss: negatives corrected for those that share the anchor's class."""

from scclr.losses.hard_negative import HardNegativeLoss


class DebiasedLoss(HardNegativeLoss):
    """total = 2 (alpha A + (1 - alpha) R) (Chuang et al. 2020, with M = 1; alpha = 0.5 is theirs).

    This is the hard-negative loss with equal weights, ``hardness = 0``: the mean in its g_ip is mean_k exp(s_ik / tau).
    ``class_prior = 0`` is NT-Xent of two views.
    """

    def __init__(self, *, alpha: float, temperature: float, class_prior: float) -> None:
        super().__init__(alpha=alpha, temperature=temperature, class_prior=class_prior, hardness=0)

"""The negatives-only supervised contrastive loss: only views of other classes repel."""

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive


class NSCLLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R) (Luthra et al. 2025, arXiv 2506.04411; alpha = 0.5 is theirs).

    A = mean_i mean_p -s_ip / tau;    R = mean_i log sum_k exp(s_ik / tau), where k are the views of other classes.

    The decoupled loss is larger by 2 (1 - alpha) mean_i -log(1 - q_i), where q_i is the mass that its softmax puts on
    the anchor's class. R is -inf for a batch of one class.

    Raises:
        ValueError: if alpha is outside [0, 1] or the temperature outside [1e-6, 1e6]; on call, if labels are missing,
            or for a batch of one image.
    """

    supervised = True
    least_images = 2

    def __init__(self, *, alpha: float, temperature: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        self.alpha, self.temperature = alpha, temperature

    def terms(self, anchors: Anchors) -> LossTerms:
        attract = -anchors.positives().mean() / self.temperature
        repel = anchors.negatives(self.temperature, label=anchors.label).mean()
        return balance(self.alpha, attract, repel)

"""The decoupled contrastive loss: NT-Xent without the positive in the denominator."""

from scclr.losses import Anchors, LogSumExpForm, Loss, LossTerms, balance, check_alpha, check_positive


class DecoupledLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of Yeh et al. (2022, arXiv 2110.06848).

    A = mean_i mean_p -s_ip / tau;    R = mean_i log sum_k exp(s_ik / tau), where k are the views of other images.

    The attraction between positives has a constant gradient. That of NT-Xent fades as positives become easy.

    Raises:
        ValueError: if alpha is outside [0, 1] or the temperature outside [1e-6, 1e6]; on call, for a batch of one
            image.
    """

    least_images = 2

    def __init__(self, *, alpha: float, temperature: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        self.alpha, self.temperature = alpha, temperature

    def logsumexp_form(self) -> LogSumExpForm:
        return LogSumExpForm(self.temperature, decoupled=True)

    def terms(self, anchors: Anchors) -> LossTerms:
        attract = -anchors.positives().mean() / self.temperature
        return balance(self.alpha, attract, anchors.negatives(self.temperature).mean())

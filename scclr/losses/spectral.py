"""The spectral contrastive loss."""

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive


class SpectralLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of HaoChen et al. (2021) at f = sqrt(mu) z.

    A = mean_i mean_p -2 mu s_ip;    R = mean_i mean_k (mu s_ik)^2, k the views of other images.

    Only second moments enter: O(N P^2) time. ``mu`` is the squared length of their embeddings f.

    Raises:
        ValueError: alpha outside [0, 1], or a mu that is not positive; on call, a batch of one image.
    """

    least_images = 2

    def __init__(self, *, alpha: float, mu: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(mu=mu)
        self.alpha, self.mu = alpha, mu

    def terms(self, anchors: Anchors) -> LossTerms:
        positives = anchors.positives()  # [V - 1, VB]
        z = anchors.z
        squares = ((z @ (anchors.pool.T @ anchors.pool)) * z).sum(1)  # [VB], over all keys
        own = positives.square().sum(0) + z.square().sum(1).square()
        others = len(anchors.here) * (anchors.images - 1)
        repel = self.mu**2 * (squares - own).mean() / others
        return balance(self.alpha, -2 * self.mu * positives.mean(), repel)

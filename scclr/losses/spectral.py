"""The spectral contrastive loss."""

from scclr.losses.anchors import Anchors
from scclr.losses.base import Loss, LossTerms, balance, check_positive


class SpectralLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of HaoChen et al. (2021) at f = sqrt(mu) z.

    A = mean_i mean_p -2 mu s_ip;    R = mean_i mean_k (mu s_ik)^2, where k are the views of other images.

    ``mu`` is the squared length of their embeddings f. Only second moments enter, so the time is O(N P^2).

    The official code (jhaochenz96/spectral_contrastive_learning) differs in three points. It divides the loss by mu.
    Its negatives are other images in the other view, while here they are in all views. It shortens f to length sqrt(mu)
    where f is longer, while here every f has this length.

    Raises:
        ValueError: if alpha is outside [0, 1] or mu outside [1e-6, 1e6]; on call, as ``Loss``.
    """

    least_images = 2

    def __init__(self, *, alpha: float, mu: float) -> None:
        super().__init__(alpha)
        check_positive(mu=mu)
        self.mu = mu

    def terms(self, anchors: Anchors) -> LossTerms:
        z, positives = anchors.z, anchors.positives()  # [VB, P], [V - 1, VB]
        squares = ((z @ (anchors.keys.T @ anchors.keys)) * z).sum(1)  # [VB], over all keys
        own_image = positives.square().sum(0) + z.square().sum(1).square()
        others = len(anchors.local_views) * (anchors.images - 1)
        repel = self.mu**2 * (squares - own_image).mean() / others
        return balance(self.alpha, -2 * self.mu * positives.mean(), repel)

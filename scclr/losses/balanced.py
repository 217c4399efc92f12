"""The balanced contrastive loss: NT-Xent with a weight between attraction and repulsion."""

from torch import Tensor

from scclr.losses import LossTerms
from scclr.losses.pairs import attract_repel, check_temperature


class BalancedLoss:
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is NT-Xent exactly.

    The balance of Lee (TMLR 2025, arXiv 2510.10572): ``(1 - alpha) / alpha`` is the weight of repulsion relative to
    attraction there, and ``1 / temperature`` the sharpness of its log-sum-exp. The coefficients of A and R sum to 2 at
    every alpha. Totals at different alpha are not comparable; A and R are.

    Raises:
        ValueError: alpha outside [0, 1] or a temperature that is not positive.
    """

    def __init__(self, *, alpha: float, temperature: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: the balance is a number in [0, 1]; alpha=0.5 is NT-Xent")
        check_temperature(temperature)
        self.alpha, self.temperature = alpha, temperature

    def __call__(self, z1: Tensor, z2: Tensor) -> LossTerms:
        """Terms of unit rows ``z1``, ``z2`` [B, P]; nats."""
        attract, repel = attract_repel(z1, z2, self.temperature)
        return LossTerms(2 * (self.alpha * attract + (1 - self.alpha) * repel), attract, repel)

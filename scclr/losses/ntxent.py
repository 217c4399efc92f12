"""NT-Xent, the loss of SimCLR."""

from torch import Tensor

from scclr.losses import LossTerms
from scclr.losses.pairs import attract_repel, check_temperature


class NTXentLoss:
    """total = A + R: cross-entropy of picking the positive among 2B - 1 views (Chen et al. 2020, eq. 1).

    Equal, value and gradient, to ``BalancedLoss(alpha=0.5)``.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, *, temperature: float) -> None:
        check_temperature(temperature)
        self.temperature = temperature

    def __call__(self, z1: Tensor, z2: Tensor) -> LossTerms:
        """Terms of unit rows ``z1``, ``z2`` [B, P]; nats."""
        attract, repel = attract_repel(z1, z2, self.temperature)
        return LossTerms(attract + repel, attract, repel)

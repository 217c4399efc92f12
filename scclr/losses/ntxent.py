"""NT-Xent, the loss of SimCLR."""

from scclr.losses.anchors import Anchors
from scclr.losses.base import LogSumExpForm, LossTerms, TemperatureLoss


class NTXentLoss(TemperatureLoss):
    """total = A + R: cross-entropy of picking the positive among the other N - 1 views (Chen et al. 2020, eq. 1).

    Its value and gradient equal those of ``BalancedLoss(alpha=0.5)``. With V > 2 views, A is a mean over V - 1
    positives.

    It is the mean over all anchors, as in the paper, lightly and solo-learn. Google's code (google-research/simclr,
    objective.py) adds the means of the two directions, which is twice this. Temperatures: 0.1 is the default of
    Google's code, 0.5 the best one on CIFAR-10 (app. B.9) and lightly's default; solo-learn's recipe has 0.2.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__(alpha=0.5, temperature=temperature)

    def logsumexp_form(self) -> LogSumExpForm:
        return LogSumExpForm(self.temperature, decoupled=False)

    def terms(self, anchors: Anchors) -> LossTerms:
        attract, both = anchors.ntxent(self.temperature)  # [VB]
        return LossTerms(both.mean(), attract.mean(), (both - attract).mean())

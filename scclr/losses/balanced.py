"""The balanced contrastive loss: NT-Xent with a weight between attraction and repulsion."""

import torch
from torch import Tensor

from scclr.losses.anchors import Anchors
from scclr.losses.base import LogSumExpForm, LossTerms, TemperatureLoss


class BalancedLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is NT-Xent exactly.

    This is the balance of Lee (TMLR 2025, arXiv 2510.10572), as public summaries and reviews state it, up to scale:
    ``lambda = (1 - alpha) / alpha`` weighs repulsion relative to attraction, and ``1 / temperature`` is the sharpness
    of the log-sum-exp. The coefficients of A and R sum to 2 at every alpha. Totals at different alpha are not
    comparable; A and R are.

    alpha may act through the balance, or through the size of the gradient as a learning rate would.
    ``rescale="constant_force"`` tells the two apart. It multiplies the part of each anchor i by the constant
    c_i = F_i(1/2) / F_i(alpha), which has no gradient:

        total      = 2 mean_i c_i (alpha A_i + (1 - alpha) R_i)
        F_i(alpha) = sum_p |alpha / (V - 1) - (1 - alpha) p_ip| + (1 - alpha) sum_n p_in

    over positives p and negatives n, with the softmax p_ik = exp(s_ik / tau - R_i). F_i is sum_k |d total_i / d s_ik|
    times tau / 2. So the forces on every anchor have the same sum as in NT-Xent, at every alpha. Where all anchors have
    the same similarities, as at the thresholds of alpha, they have the same factor, and the thresholds do not change.

    Args:
        similarity: ``cosine`` takes unit rows; ``dot`` takes rows of any length, as an ablation.
        rescale: ``none`` or ``constant_force``.

    Raises:
        ValueError: for an argument out of range, an unknown choice, or ``similarity="dot"`` at alpha != 0.5.
    """

    def __init__(self, *, alpha: float, temperature: float, similarity: str = "cosine", rescale: str = "none") -> None:
        super().__init__(alpha=alpha, temperature=temperature)
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity={similarity}: choose one of cosine, dot")
        if rescale not in ("none", "constant_force"):
            raise ValueError(f"rescale={rescale}: choose one of none, constant_force")
        if similarity == "dot" and alpha != 0.5:
            raise ValueError(
                f"similarity=dot has no minimum at alpha={alpha}: the loss falls to -inf as embeddings grow; "
                "type alpha=0.5, or similarity=cosine"
            )
        self.similarity, self.rescale = similarity, rescale

    def logsumexp_form(self) -> LogSumExpForm | None:
        return LogSumExpForm(self.temperature, decoupled=False) if self.similarity == "cosine" else None

    def terms(self, anchors: Anchors) -> LossTerms:
        attract, both = anchors.ntxent(self.temperature, unit=self.similarity == "cosine")  # [VB]
        repel = both - attract
        each = 2 * ((1 - self.alpha) * both + (2 * self.alpha - 1) * attract)  # 2 (alpha A_i + (1 - alpha) R_i)
        if self.rescale == "constant_force":
            p = (anchors.positives() / self.temperature - repel).detach().exp()  # [V - 1, VB], of the positives
            each = each * _force(0.5, p) / _force(self.alpha, p)
        return LossTerms(each.mean(), attract.mean(), repel.mean())


def _force(alpha: float, p: Tensor) -> Tensor:
    """F_i(alpha), [VB], from the softmax of the positives [V - 1, VB]."""
    by_positives = (alpha / len(p) - (1 - alpha) * p).abs().sum(0)
    by_negatives = (1 - alpha) * (1 - p.sum(0)).clamp(min=0)
    return (by_positives + by_negatives).clamp(min=torch.finfo(p.dtype).tiny)

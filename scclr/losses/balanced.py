"""The balanced contrastive loss: NT-Xent with a weight between attraction and repulsion."""

import torch
from torch import Tensor

from scclr.losses import Anchors, Loss, LossTerms, Softmax, check_alpha, check_positive


class BalancedLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is NT-Xent exactly.

    The balance of Lee (TMLR 2025, arXiv 2510.10572), up to scale: ``lambda = (1 - alpha) / alpha`` weighs repulsion
    relative to attraction, and ``1 / temperature`` is the sharpness of its log-sum-exp. The coefficients of A and R sum
    to 2 at every alpha. Totals at different alpha are not comparable; A and R are.

    Does alpha act through the balance, or through the size of the gradient, as a learning rate would? ``rescale``
    multiplies the total to tell them apart:

    - ``attract``: by 1 / (2 alpha): attraction has weight one, and repulsion lambda.
    - ``constant_force``: each anchor's part by c_i = F_i(1/2) / F_i(alpha), taken as a constant, where F_i(alpha) =
      sum_p |alpha / (V - 1) - (1 - alpha) p_ip| + (1 - alpha) sum_n p_in, over positives p and negatives n with softmax
      p_ik = exp(s_ik / tau - R_i), is tau / 2 times sum_k |d total_i / d s_ik|. So every anchor is pulled and pushed
      as hard in sum as by NT-Xent, at every alpha. The total is 2 mean_i c_i (alpha A_i + (1 - alpha) R_i).

    Args:
        alpha: weight of attraction in [0, 1].
        temperature: a number, or a tensor that is to be learned.
        similarity: ``cosine`` promises unit rows; ``dot`` takes rows of any length, as an ablation.
        rescale: ``none``, ``attract`` or ``constant_force``.

    Raises:
        ValueError: alpha outside [0, 1]; a temperature that is not positive; an unknown choice; ``similarity="dot"``
            at alpha != 0.5; ``rescale="attract"`` at alpha = 0.
    """

    def __init__(self, *, alpha: float, temperature: float, similarity: str = "cosine", rescale: str = "none") -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity={similarity}: choose one of cosine, dot")
        if rescale not in ("none", "attract", "constant_force"):
            raise ValueError(f"rescale={rescale}: choose one of none, attract, constant_force")
        if similarity == "dot" and alpha != 0.5:
            raise ValueError(
                f"similarity=dot has no minimum at alpha={alpha}: the loss falls to -inf as embeddings grow; "
                "type alpha=0.5, or similarity=cosine"
            )
        if rescale == "attract" and alpha == 0:
            raise ValueError("rescale=attract divides by alpha=0: type rescale=none, or alpha above 0")
        self.alpha, self.temperature = alpha, temperature
        self.similarity, self.rescale = similarity, rescale

    def softmax(self) -> Softmax | None:
        return Softmax(self.temperature, decoupled=False) if self.similarity == "cosine" else None

    def terms(self, anchors: Anchors) -> LossTerms:
        attract, both = anchors.ntxent(self.temperature, unit=self.similarity == "cosine")  # [VB]
        repel = both - attract
        each = 2 * ((1 - self.alpha) * both + (2 * self.alpha - 1) * attract)  # 2 (alpha A_i + (1 - alpha) R_i)
        if self.rescale == "attract":
            each = each / (2 * self.alpha)
        if self.rescale == "constant_force":
            share = (anchors.positives() / self.temperature - repel).detach().exp()  # [V - 1, VB], the positives' p_ip
            each = each * _force(0.5, share) / _force(self.alpha, share)
        return LossTerms(each.mean(), attract.mean(), repel.mean())


def _force(alpha: float, share: Tensor) -> Tensor:
    """F_i(alpha), [VB], of the positives' softmax [V - 1, VB]."""
    pulls = (alpha / len(share) - (1 - alpha) * share).abs().sum(0)
    pushes = (1 - alpha) * (1 - share.sum(0)).clamp(min=0)
    return (pulls + pushes).clamp(min=torch.finfo(share.dtype).tiny)

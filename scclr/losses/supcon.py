"""The supervised contrastive loss: every view of the same class attracts."""

import torch

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive


class SupConLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is L_out of Khosla et al. (2020, eq. 2).

    A = mean_i mean_{p in P(i)} -s_ip / tau, P(i) the other views of the same label;
    R = mean_i log sum_{k != i} exp(s_ik / tau), as in NT-Xent.

    Raises:
        ValueError: alpha outside [0, 1], or a temperature that is not positive; on call, labels that are missing.
    """

    supervised = True

    def __init__(self, *, alpha: float, temperature: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(temperature=temperature)
        self.alpha, self.temperature = alpha, temperature

    def terms(self, anchors: Anchors) -> LossTerms:
        label = anchors.label  # [VG]
        group = torch.searchsorted(label.sort().values, label)  # where the label's run begins: an index below VG
        sums = torch.zeros_like(anchors.pool).index_add(0, group, anchors.pool)  # [VG, P], by group
        sizes = torch.zeros_like(label).index_add(0, group, torch.ones_like(label))  # [VG], by group
        mine = group[anchors.place]  # [VB]
        similarities = (anchors.z * (sums[mine] - anchors.z)).sum(1) / (sizes[mine] - 1)  # [VB], without the anchor
        attract = -similarities.mean() / self.temperature
        return balance(self.alpha, attract, anchors.repel(self.temperature).mean())

"""The supervised contrastive loss: every view of the same class attracts."""

import torch

from scclr.losses.anchors import Anchors
from scclr.losses.base import LossTerms, TemperatureLoss, balance


class SupConLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is L_out of Khosla et al. (2020, eq. 2).

    A = mean_i mean_{p in P(i)} -s_ip / tau, where P(i) are the other views with the anchor's label;
    R = mean_i log sum_{k != i} exp(s_ik / tau), as in NT-Xent.

    The authors' code (HobbitLong/SupContrast, losses.py) multiplies this by tau / 0.07. Temperatures: 0.07 is its
    default, and 0.1 that of its recipe for CIFAR-10 and of the paper.
    """

    supervised = True

    def terms(self, anchors: Anchors) -> LossTerms:
        keys, label = anchors.keys, anchors.label  # [VG, P], [VG]
        group = torch.searchsorted(label.sort().values, label)  # where the label's run begins: an index below VG
        sums = torch.zeros_like(keys).index_add(0, group, keys)  # [VG, P], by group
        sizes = torch.zeros_like(label).index_add(0, group, torch.ones_like(label))  # [VG], by group
        own = group[anchors.anchor_rows]  # [VB]
        similarities = (anchors.z * (sums[own] - anchors.z)).sum(1) / (sizes[own] - 1)  # [VB], without the anchor
        attract = -similarities.mean() / self.temperature
        return balance(self.alpha, attract, anchors.repel(self.temperature).mean())

"""The supervised objective that contrastive losses approximate: attraction to the prototype of the own class."""

import math

import torch

from scclr.losses.anchors import Anchors
from scclr.losses.base import LossTerms, TemperatureLoss, balance


class PrototypeLoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R), after the supervised objective of Lee (TMLR 2025, arXiv 2510.10572).

    The form is taken from public summaries and reviews of the paper, whose own may differ.

    A = mean_i -<z_i, mu_y> / tau
    R = mean_i max_{c != y} <z_i, mu_c> / tau    or    mean_i log sum_{c != y} exp(<z_i, mu_c> / tau)

    y is the class of anchor i. The prototypes mu are the class means of the batch, not normalized; gradients pass
    through them. Classes that are not in the batch do not repel, and a batch of one class has R = -inf.

    Args:
        classes: their number C, from 2; labels are in [0, C).
        repulsion: ``max`` or ``logsumexp``.

    Raises:
        ValueError: as ``TemperatureLoss``, for fewer than two classes, or for an unknown repulsion.
    """

    supervised = True

    def __init__(self, *, alpha: float, temperature: float, repulsion: str, classes: int) -> None:
        super().__init__(alpha=alpha, temperature=temperature)
        if repulsion not in ("max", "logsumexp"):
            raise ValueError(f"repulsion={repulsion}: choose one of max, logsumexp")
        if classes < 2:
            raise ValueError(f"classes={classes}: a supervised objective needs two or more")
        self.repulsion, self.classes = repulsion, classes

    def terms(self, anchors: Anchors) -> LossTerms:
        keys, label = anchors.keys, anchors.label  # [VG, P], [VG]
        counts = keys.new_zeros(self.classes).index_add(0, label, torch.ones_like(keys[:, 0]))  # [C]
        sums = keys.new_zeros(self.classes, keys.shape[1]).index_add(0, label, keys)
        prototypes = sums / counts.clamp(min=1).unsqueeze(1)  # [C, P]
        with_class = anchors.z @ prototypes.T / self.temperature  # [VB, C]
        own = label[anchors.anchor_rows].unsqueeze(1)  # [VB, 1]
        attract = -with_class.gather(1, own).mean()
        others = with_class.masked_fill(counts == 0, -math.inf).scatter(1, own, -math.inf)
        repel = others.amax(1) if self.repulsion == "max" else others.logsumexp(1)
        return balance(self.alpha, attract, repel.mean())

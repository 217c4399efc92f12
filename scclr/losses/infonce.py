"""InfoNCE across views, whose value bounds mutual information."""

from itertools import product

import torch

from scclr.losses.anchors import Anchors
from scclr.losses.base import LossTerms, TemperatureLoss, balance
from scclr.losses.pairs import row_logsumexp


class InfoNCELoss(TemperatureLoss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of van den Oord et al. (2018, eq. 4).

    A = mean -<z_v, z_w> / tau of one image;    R = mean log sum_k exp(<z_v, z_wk> / tau), where k are all images in w

    Both are means over ordered pairs of views v and w. The denominator holds the positive and one view of each other
    image. So log(images) - total at alpha = 0.5 is a lower bound of the mutual information of two views, in nats. With
    the denominator of NT-Xent it is not a bound.

    The paper compares log-bilinear scores and has no temperature; cosines divided by a temperature are later. CLIP's
    loss (Radford et al. 2021, fig. 3) is this one for two views, with the same factor and a temperature that is learned
    from 0.07 on. MoCo (He et al. 2020, eq. 1) takes one direction, negatives from a queue, and 0.07.
    """

    def terms(self, anchors: Anchors) -> LossTerms:
        repel = [
            row_logsumexp(z, self.temperature, keys=keys)  # [B]
            for (v, z), (w, keys) in product(enumerate(anchors.local_views), enumerate(anchors.all_views))
            if v != w
        ]
        attract = -anchors.positives().mean() / self.temperature
        return balance(self.alpha, attract, torch.stack(repel).mean())

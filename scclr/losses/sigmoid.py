"""The sigmoid loss: every pair of views is a binary decision."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scclr.losses import pairs
from scclr.losses.anchors import Anchors
from scclr.losses.base import Loss, LossTerms, balance, check_positive, check_range


class SigmoidLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of SigLIP (Zhai et al. 2023, alg. 1).

    A = mean_i softplus(-(scale s_ii + bias));    R = mean_i sum_{k != i} softplus(scale s_ik + bias)

    Here i and k are images in two different views; with V > 2 views both are means over all pairs of views. No anchor
    is normalized over its keys.

    SigLIP learns scale and bias from the values in conf/loss/sigmoid.yaml on. Here they stay as they are given.

    Raises:
        ValueError: if alpha is outside [0, 1], scale outside [1e-6, 1e6], or bias outside [-1e6, 1e6].
    """

    def __init__(self, *, alpha: float, scale: float, bias: float) -> None:
        super().__init__(alpha)
        check_positive(scale=scale)
        check_range(-1e6, 1e6, bias=bias)
        self.scale, self.bias = scale, bias

    def terms(self, anchors: Anchors) -> LossTerms:
        repel, tile = [], pairs.tile_of(anchors.z.device)
        image = anchors.row_id[: anchors.images]  # [G]
        own = anchors.anchor_rows[: len(anchors.local_views[0])]  # [B]
        for v, w in combinations(range(len(anchors.local_views)), 2):
            # The backward pass computes each tile again instead of keeping it.
            tiles = [
                checkpoint(self._sum, *rows, *columns, use_reentrant=False, preserve_rng_state=False)
                for rows in zip(anchors.local_views[v].split(tile), own.split(tile), strict=True)
                for columns in zip(anchors.all_views[w].split(tile), image.split(tile), strict=True)
            ]
            repel.append(torch.stack(tiles).sum() / len(own))
        attract = F.softplus(-(self.scale * anchors.positives() + self.bias)).mean()
        return balance(self.alpha, attract, torch.stack(repel).mean())

    def _sum(self, rows: Tensor, row_images: Tensor, keys: Tensor, key_images: Tensor) -> Tensor:
        """R of one tile, as a sum."""
        logits = self.scale * (rows @ keys.T) + self.bias
        return F.softplus(logits.masked_fill(row_images.unsqueeze(1) == key_images, -math.inf)).sum()

"""The sigmoid loss: every pair of views is a binary decision."""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scclr.losses import Anchors, Loss, LossTerms, balance, check_alpha, check_positive
from scclr.losses.pairs import tile_of


class SigmoidLoss(Loss):
    """total = 2 (alpha A + (1 - alpha) R); alpha = 0.5 is the loss of SigLIP (Zhai et al. 2023, alg. 1).

    A = mean_i softplus(-(scale s_ii + bias));    R = mean_i sum_{k != i} softplus(scale s_ik + bias)

    between two views, i and k images; a mean over the pairs of V > 2 views. No anchor is normalised over its keys.

    Args:
        scale, bias: numbers, or tensors that are to be learned.

    Raises:
        ValueError: alpha outside [0, 1], a scale that is not positive, or a bias that is not finite.
    """

    def __init__(self, *, alpha: float, scale: float, bias: float) -> None:
        super().__init__()
        check_alpha(alpha)
        check_positive(scale=scale)
        if not math.isfinite(bias):
            raise ValueError(f"bias={bias}: give a number, such as -10")
        self.alpha, self.scale, self.bias = alpha, scale, bias

    def terms(self, anchors: Anchors) -> LossTerms:
        repel, tile = [], tile_of(anchors.z.device)
        images = anchors.view[: anchors.images]  # [G]
        mine = anchors.place[: len(anchors.here[0])]  # [B]
        for v, w in combinations(range(len(anchors.here)), 2):
            tiles = [
                checkpoint(self._sum, *rows, *columns, use_reentrant=False, preserve_rng_state=False)
                for rows in zip(anchors.here[v].split(tile), mine.split(tile), strict=True)
                for columns in zip(anchors.there[w].split(tile), images.split(tile), strict=True)
            ]
            repel.append(torch.stack(tiles).sum() / len(mine))
        attract = F.softplus(-(self.scale * anchors.positives() + self.bias)).mean()
        return balance(self.alpha, attract, torch.stack(repel).mean())

    def _sum(self, rows: Tensor, images: Tensor, keys: Tensor, key_images: Tensor) -> Tensor:
        """Of one tile, which the backward pass computes again rather than keep."""
        logits = self.scale * (rows @ keys.T) + self.bias
        return F.softplus(logits.masked_fill(images.unsqueeze(1) == key_images, -math.inf)).sum()

"""A linear classifier that is trained beside the encoder, on representations that it gets no gradient through.

Dimensions: G images in a step, B of them in this process, V views of each, D features, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scclr.run import distributed

LR = 1e-2  # of Adam; after 20 epochs of digits it is right on 84 % of the views, at 1e-3 on 68 %, at 3e-2 on 85 %


class OnlineProbe:
    """What ``pretrain.online_probe`` trains, and how often it was right since the last logged row.

    It reads labels of training images, and changes nothing but itself: it has an optimizer and a generator of its own,
    and computes gradients of its own weights only. Each step classifies before it learns. N processes compute what one
    would.

    Args:
        width: D.
        classes: K.
        device: of the representations.
        seed: of the initial weights.
    """

    def __init__(self, width: int, classes: int, device: torch.device, seed: int) -> None:
        self.layer = nn.utils.skip_init(nn.Linear, width, classes, device=device)
        weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.zero_()
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=LR)
        self.right, self.seen = torch.zeros((), dtype=torch.float64, device=device), 0

    def learn(self, h: Tensor, labels: Tensor) -> None:
        """One step on the representations [V, B, D] of this process, with its labels int64 [B]. Nothing waits for the
        device."""
        views = len(h) * len(labels) * distributed.world_size()  # of all processes
        y = labels.repeat(len(h))
        with torch.enable_grad():
            logits = self.layer(h.float().flatten(0, 1))
            loss = F.cross_entropy(logits, y, reduction="sum") / views
        gradients = torch.autograd.grad(loss, [self.layer.weight, self.layer.bias])
        for weight, gradient in zip((self.layer.weight, self.layer.bias), gradients, strict=True):
            weight.grad = distributed.all_reduce_sum(gradient)
        self.optimizer.step()
        self.right += (logits.detach().argmax(1) == y).sum()
        self.seen += views

    def top1(self) -> dict[str, float]:
        """The accuracy since the last call, over the views of all processes. Every process must call this."""
        value = distributed.all_reduce_sum(self.right.clone()).item() / max(1, self.seen)
        self.right.zero_()
        self.seen = 0
        return {"online/top1": value}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. Every process must call this."""
        right = distributed.all_reduce_sum(self.right.clone()) / distributed.world_size()  # each will hold as much
        return {
            "layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict(),
            "right": right, "seen": self.seen,
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.layer.load_state_dict(saved["layer"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.right.copy_(saved["right"])
        self.seen = int(saved["seen"])

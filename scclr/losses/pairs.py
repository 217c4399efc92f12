"""The two terms that every loss over pairs of views is made of."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless ``temperature`` is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: give a positive number, such as 0.5")


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where ``device`` has any."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def attract_repel(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(A, R) of NT-Xent (Chen et al. 2020, eq. 1), each a mean over the 2B views as anchors.

    Args:
        z1, z2: unit rows [B, P] of the two views, B >= 1. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: shapes that differ or are not [B, P].
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) == 0:
        raise ValueError(f"z1 and z2 must have one shape [B, P] with B >= 1, not {list(z1.shape)} and {list(z2.shape)}")
    z = torch.cat([z1, z2])  # [2B, P]
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    with full_precision(z.device):
        first, second = z.chunk(2)
        attract = -(first * second).sum(1).mean() / temperature  # s_{i,p} = s_{p,i}: B values serve 2B anchors
        logits = (z @ z.T) / temperature  # [2B, 2B]
        self_pair = torch.eye(len(z), dtype=torch.bool, device=z.device)
        repel = logits.masked_fill(self_pair, float("-inf")).logsumexp(1).mean()
    return attract, repel

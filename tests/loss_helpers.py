"""Views to compute losses on, and measures of what comes out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LABELS = torch.tensor([2, 0, 2, 1, 0])  # of the five images of ``unit_views``

few = settings(max_examples=20, deadline=None, derandomize=True)
alphas = st.floats(0, 1)
temperatures = st.sampled_from([0.1, 0.2, 0.5, 1.0])
seeds = st.integers(0, 999)


def unit_views(seed: int, images: int = 5, width: int = 4, count: int = 2, noise: float = 0.7) -> list[Tensor]:
    """Views [images, width] that are ``noise`` away from a common image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, width, generator=generator, dtype=torch.float64)
    noises = noise * torch.randn(count, images, width, generator=generator, dtype=torch.float64)
    return list(F.normalize(image + noises, dim=2))


def gradient(function: Callable[..., Tensor], views: list[Tensor]) -> Tensor:
    """The gradient of ``function(*views)`` along the sphere, [V, B, P]: the part along each row is left out."""
    leaves = [view.clone().requires_grad_() for view in views]
    raw = torch.stack(torch.autograd.grad(function(*leaves), leaves))
    rows = torch.stack(views)
    return raw - (raw * rows).sum(2, keepdim=True) * rows


def close(a, b, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out

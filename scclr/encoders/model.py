"""Encoder, projector and the unit sphere: images -> h [B, D] -> z [B, P]."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scclr.config.errors import one_line
from scclr.config.schema import ProjectorConfig


class Model(nn.Module):
    """What is trained: normalization of pixels, ``encoder``, ``projector``, normalization of embeddings.

    ``mean`` and ``std`` of the pretraining data are buffers, so a loaded encoder normalizes pixels as it did in
    training. Embeddings are normalized here and nowhere else, in float32.

    Args:
        encoder: images [B, C, H, W] -> h [B, encoder.feature_dim].
        mean, std: one number per channel, of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: nn.Module, projector: ProjectorConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1))
        self.encoder = encoder
        self.projector = make_projector(int(encoder.feature_dim), projector)  # type: ignore[arg-type]
        self.normalize = projector.normalize

    @property
    def channels(self) -> int:
        return self.mean.shape[1]

    def width(self, layer: str) -> int:
        """D of ``h`` or P of ``z``."""
        last = list(self.projector)[-1:] if layer == "z" else []
        return int(last[0].out_features if last else self.encoder.feature_dim)  # type: ignore[arg-type]

    def represent(self, images: Tensor) -> Tensor:
        """Representations h [B, D] of float images [B, C, H, W] in [0, 1]."""
        # On a CPU, images in channels_last broadcast several times faster against a whole image than against a pixel.
        mean, std = (torch.empty_like(images[:1], dtype=x.dtype).copy_(x) for x in (self.mean, self.std))
        return self.encoder((images - mean).div_(std))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, D], and z [B, P] in float32: with unit rows if ``normalize``, where an all-zero row stays zero."""
        h = self.represent(images)
        z = self.projector(h).float()
        return h, F.normalize(z, dim=1) if self.normalize else z


@torch.no_grad()
def activations(model: Model, side: int) -> int:
    """How many numbers the backward pass keeps of an image of ``side`` x ``side`` pixels, at least: the outputs of
    convolutions and linear layers.

    ``model`` is on the meta device, where nothing is computed or allocated.

    Raises:
        ValueError: the encoder takes no images of this size.
    """
    found = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(lambda _, __, output: found.append(output.numel())) for layer in layers]
    training = model.training
    try:
        model.eval()(torch.empty(1, model.channels, side, side, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the encoder takes no images of {side} x {side} pixels ({one_line(error)})") from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sum(found)


def make_projector(in_dim: int, config: ProjectorConfig) -> nn.Sequential:
    """``depth`` linear layers with ReLU, and batch norm if configured, in between; the identity if ``depth`` is 0."""
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(config.depth - 1):
        layers.append(nn.Linear(width, config.hidden_dim, bias=not config.batch_norm))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(config.hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        width = config.hidden_dim
    if config.depth > 0:
        layers.append(nn.Linear(width, config.out_dim))
    return nn.Sequential(*layers)

"""The residual networks of torchvision with a stem that suits the size of the images."""

import warnings

import torch
import torchvision
from torch import Tensor, nn

SMALL_IMAGE = 64  # pixels; up to this size the stem is SimCLR's for CIFAR-10 (Chen et al. 2020, app. B.9)


class ResNet(nn.Module):
    """ResNet-18, -34 or -50 without its classifier.

    Args:
        image_size: pixels on a side.
        depth: 18, 34 or 50.
        stem: ``small`` (3x3, stride 1, no max-pooling), ``imagenet`` (7x7, stride 2, max-pooling), or ``auto``, which
            is small up to 64 pixels. An ``imagenet`` stem on such images warns: it leaves only a few pixels.

    Raises:
        ValueError: for another depth or stem.
    """

    def __init__(self, *, in_channels: int, image_size: int, depth: int, stem: str) -> None:
        super().__init__()
        if depth not in (18, 34, 50):
            raise ValueError(f"depth={depth}: choose 18, 34 or 50")
        if stem not in ("auto", "small", "imagenet"):
            raise ValueError(f"stem={stem}: choose auto, small or imagenet")
        small = image_size <= SMALL_IMAGE
        trial = torch.empty(0).device.type == "meta"  # only to count the weights
        if stem == "imagenet" and small and not trial:
            warnings.warn(
                f"a 7x7 stem with max-pooling on {image_size}-pixel images: stem=auto suits them", stacklevel=2
            )
        self.network = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        self.feature_dim: int = self.network.fc.in_features
        self.network.fc = nn.Identity()
        if stem == "small" or (stem == "auto" and small):
            self.network.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
            self.network.maxpool = nn.Identity()
        elif in_channels != 3:
            self.network.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # [B, feature_dim]

"""Augmentations in which everything is off but what a test turns on, SimCLR's, and images for them."""

import torch
from torch import Tensor

from scclr.augment import Augment

OFF = {
    "views": [{}, {}], "size": None, "exact": True,
    "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "jitter": 0.0, "brightness": 0.0,
    "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0, "blur_sigma": [0.1, 2.0],
    "solarize": 0.0,
}  # fmt: skip
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
CROP = {"crop_scale": [0.2, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip": 0.5}
SIMCLR = {**CROP, "crop_scale": [0.08, 1.0], **JITTER, "jitter": 0.8, "grayscale": 0.2, "exact": False}
ALL = {**CROP, **JITTER, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.3}


def make(**changes: object) -> Augment:
    return Augment(**{**OFF, **changes})  # type: ignore[arg-type]


def simclr(**changes: object) -> Augment:
    return make(**{**SIMCLR, **changes})


def pictures(n: int = 6, channels: int = 3, side: int = 32) -> Tensor:
    smooth = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(smooth, (side, side), mode="bilinear").mul(255).byte()

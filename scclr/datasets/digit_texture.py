"""Digits on textures: grey images of 16 x 16 pixels with two features that are independent of each other.

Dimensions: N images, C digits, T textures.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.digits import Digits

LABELS = ("digit", "texture")
DIRECTIONS, WAVELENGTHS = 5, (3.0, 6.0)  # gratings of each wavelength, in pixels, are 36 degrees apart
TEXTURES = [f"{180 * k // DIRECTIONS} degrees, {wave:g} pixels" for wave in WAVELENGTHS for k in range(DIRECTIONS)]
CONTRAST = 0.5  # of the brightest texture to the ink of the digit


@dataclass(frozen=True, kw_only=True)
class DigitTexture(Source):
    """scikit-learn's digits, drawn twice as large over a grating of one of ten directions and wavelengths.

    The grating has a random phase, so a texture is no pattern of pixels. Every digit has equally many images on every
    texture, up to one. Phases, textures and the test split depend on ``split_seed`` alone: with either ``label`` the
    images are the same, and so is the test split, of which no pretraining sees an image.

    Args:
        label: ``digit`` or ``texture``, which of the two features the labels are.

    Raises:
        ValueError: another label; as ``Source``.
    """

    label: str = LABELS[0]
    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label not in LABELS:
            raise ValueError(f"label={self.label}: choose {' or '.join(LABELS)}")

    def read(self) -> Parts:
        digits = Digits(validation=None, mean=self.mean, std=self.std).read()
        assert isinstance(digits.train.images, Tensor)
        ink = F.interpolate(digits.train.images / 255, scale_factor=2, mode="bilinear")  # [N, 1, 16, 16]
        draw = np.random.default_rng(self.split_seed)
        texture = torch.zeros_like(digits.train.labels)
        for digit in range(len(digits.classes)):
            members = (digits.train.labels == digit).nonzero().squeeze(1)
            texture[members] = torch.from_numpy(draw.permutation(len(members))) % len(TEXTURES)
        phase = torch.from_numpy(draw.uniform(0, 2 * np.pi, len(ink))).float()
        images = (ink + (1 - ink) * CONTRAST * gratings(texture, phase, self.image_size)).mul(255).round().byte()
        both = ImageSet(images, digits.train.labels * len(TEXTURES) + texture)
        names = [f"{digit} on {texture}" for digit in digits.classes for texture in TEXTURES]
        train, test = (self._labelled(part) for part in self._carve(both, self.test, "test", names))
        return Parts(train, test, digits.classes if self.label == "digit" else TEXTURES)

    def _labelled(self, both: ImageSet) -> ImageSet:
        """``both`` with the one of its two labels that is asked for."""
        digit, texture = both.labels // len(TEXTURES), both.labels % len(TEXTURES)
        return ImageSet(both.images, digit if self.label == "digit" else texture)


def gratings(texture: Tensor, phase: Tensor, size: int) -> Tensor:
    """Waves in [0, 1] of the given textures and phases, both [N]: [N, 1, size, size]."""
    angle = texture % DIRECTIONS * torch.pi / DIRECTIONS
    wavelength = torch.tensor(WAVELENGTHS)[texture // DIRECTIONS]
    at = torch.arange(size, dtype=torch.float32)
    along = angle.cos().view(-1, 1, 1) * at + angle.sin().view(-1, 1, 1) * at.view(-1, 1)  # [N, size, size]
    waves = (2 * torch.pi * along / wavelength.view(-1, 1, 1) + phase.view(-1, 1, 1)).cos()
    return (waves.unsqueeze(1) + 1) / 2

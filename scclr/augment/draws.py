"""The random parameters of views: a few floats for each, drawn on the CPU.

Dimensions: B images, V views of each, R = V B rows: all first views, then all second ones.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop takes a centre crop after so many


class Draws(NamedTuple):
    """One row per view, on the CPU. Nothing here depends on the size of the images."""

    crop_area: Tensor  # [R, attempts]: area of the crop divided by that of its image
    crop_aspect: Tensor  # [R, attempts]: width divided by height
    crop_position: Tensor  # [R, attempts, 2]: top and left, as a share of the room that the crop leaves
    crop_ratio: Tensor  # [R, 2]: the least and the greatest aspect ratio
    flipped: Tensor  # bool [R]
    degrees: Tensor  # [R]
    jittered: Tensor  # bool [R]
    jitter_order: Tensor  # [R, 4]: which colour operation is first, second, third and fourth
    jitter_factors: Tensor  # [R, 4]: of brightness, contrast, saturation, hue
    grey: Tensor  # bool [R]
    blurred: Tensor  # bool [R]
    sigma: Tensor  # [R]
    solarized: Tensor  # bool [R]

    def select_images(self, views: int, images: slice) -> Self:
        """The rows of some of the images, in all of the ``views``."""
        return type(self)(*(values.unflatten(0, (views, -1))[:, images].flatten(0, 1) for values in self))

    def boxes(self, height: Tensor | int, width: Tensor | int) -> Tensor:
        """Crops (top, left, height, width) in whole pixels, float32 [R, 4], as torchvision's RandomResizedCrop.

        The first attempt whose box fits the image is taken. If none fits, it is the largest centred crop whose aspect
        ratio is in range. ``height`` and ``width`` are those of the images: numbers for all, or one for each row.
        """
        high, wide = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1) for value in (height, width))
        area = high * wide * self.crop_area
        w, h = (area * self.crop_aspect).sqrt().round(), (area / self.crop_aspect).sqrt().round()
        fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)  # [R, attempts]
        first = fits.float().argmax(1, keepdim=True)
        w, h, top, left = (values.gather(1, first) for values in (w, h, *self.crop_position.unbind(2)))  # [R, 1]
        top, left = (top * (high - h + 1)).floor(), (left * (wide - w + 1)).floor()
        least_ratio, greatest_ratio = self.crop_ratio.split(1, 1)
        all_h = torch.where(wide / high < least_ratio, (wide / least_ratio).round(), high)
        all_w = torch.where(wide / high > greatest_ratio, (high * greatest_ratio).round(), wide)
        centred = torch.cat([((high - all_h) / 2).floor(), ((wide - all_w) / 2).floor(), all_h, all_w], 1)
        return torch.where(fits.any(1, keepdim=True), torch.cat([top, left, h, w], 1), centred)

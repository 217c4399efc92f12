"""The random parameters of views: a few floats each, drawn on the CPU.

Dimensions: B images, V views of each, R = V B rows: all first views, then all second ones.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop falls back to a centre crop after as many


class Draws(NamedTuple):
    """On the CPU, a row a view; nothing here depends on the size of the images."""

    area: Tensor  # [R, attempts]: a crop's share of its image
    aspect: Tensor  # [R, attempts]: its width over its height
    place: Tensor  # [R, attempts, 2]: where it lies, top and left, as a share of the room that it leaves
    ratio: Tensor  # [R, 2]: the least and the greatest aspect ratio
    flipped: Tensor  # bool [R], as are the others of this kind
    degrees: Tensor  # [R]
    jittered: Tensor
    turn: Tensor  # [R, 4]: which colour operation comes when
    factors: Tensor  # [R, 4]: of brightness, contrast, saturation, hue
    grey: Tensor
    blurred: Tensor
    sigma: Tensor  # [R]
    inverted: Tensor

    def of(self, views: int, images: slice) -> Self:
        """The rows of some of the images, in all of the ``views``."""
        return type(self)(*(values.unflatten(0, (views, -1))[:, images].flatten(0, 1) for values in self))

    def boxes(self, height: Tensor | int, width: Tensor | int) -> Tensor:
        """Crops (top, left, height, width) in whole pixels, float32 [R, 4], as torchvision's RandomResizedCrop.

        The first attempt whose box fits the image is taken; after ten, the largest centred crop whose aspect ratio is
        in range. ``height`` and ``width`` are those of the images, one for all or one for each row.
        """
        high, wide = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1) for value in (height, width))
        area = high * wide * self.area
        w, h = (area * self.aspect).sqrt().round(), (area / self.aspect).sqrt().round()
        fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)  # [R, attempts]
        first = fits.float().argmax(1, keepdim=True)
        w, h, top, left = (values.gather(1, first) for values in (w, h, *self.place.unbind(2)))  # [R, 1]
        top, left = (top * (high - h + 1)).floor(), (left * (wide - w + 1)).floor()
        low, high_ratio = self.ratio.split(1, 1)
        all_h = torch.where(wide / high < low, (wide / low).round(), high)
        all_w = torch.where(wide / high > high_ratio, (high * high_ratio).round(), wide)
        centred = torch.cat([((high - all_h) / 2).floor(), ((wide - all_w) / 2).floor(), all_h, all_w], 1)
        return torch.where(fits.any(1, keepdim=True), torch.cat([top, left, h, w], 1), centred)

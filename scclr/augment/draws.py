"""How a view is made, and its random parameters: a few floats for each, drawn on the CPU.

Dimensions: B images, V views of each, R = V B rows: all first views, then all second ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop takes a centre crop after so many
RANGES = {
    "crop_scale": (1e-4, 1), "crop_ratio": (0.01, 100), "flip": (0, 1), "rotation": (0, 180), "jitter": (0, 1),
    "brightness": (0, 10), "contrast": (0, 10), "saturation": (0, 10), "hue": (0, 0.5), "grayscale": (0, 1),
    "blur": (0, 1), "blur_sigma": (1e-3, 1000), "solarize": (0, 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a view is made, in SimCLR's order: rotation, crop, flip, colour jitter, grayscale, blur, solarization.

    Args:
        crop_scale: least and greatest area of the crop divided by the image's, in [1e-4, 1]; ``[1, 1]`` keeps the whole
            image.
        crop_ratio: least and greatest aspect ratio of the crop, in [0.01, 100]; it is log-uniform in between.
        flip: probability of a horizontal flip.
        rotation: degrees in [0, 180]; the angle is uniform in ``[-rotation, rotation]``, and the corners become black.
        jitter: probability of colour jitter, whose four operations come in a random order for every view.
        brightness, contrast, saturation: strength ``x`` in [0, 10]; the factor is uniform in
            ``[max(0, 1 - x), 1 + x]``.
        hue: strength in [0, 0.5]; the shift is uniform in ``[-hue, hue]`` turns.
        grayscale: probability of turning grey.
        blur: probability of a Gaussian blur, whose kernel spans a tenth of the view (SimCLR, app. A).
        blur_sigma: least and greatest standard deviation of the blur in pixels, in [0.001, 1000]; it is uniform in
            between.
        solarize: probability of inverting the pixels of 0.5 and above (BYOL, app. B).

    Raises:
        ValueError: for what is not a number in its range, or a least value above the greatest.
    """

    crop_scale: list[float]
    crop_ratio: list[float]
    flip: float
    rotation: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: float
    blur_sigma: list[float]
    solarize: float

    def __post_init__(self) -> None:
        for name, (least, greatest) in RANGES.items():
            value, advice = getattr(self, name), f"a number from {least:g} to {greatest:g}"
            ends: Sequence[Any] = [value]
            if name in ("crop_scale", "crop_ratio", "blur_sigma"):
                advice = f"[low, high] with {least:g} <= low <= high <= {greatest:g}"
                ends = value if isinstance(value, list | tuple) and len(value) == 2 else [None]
            numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
            if not (numbers and least <= ends[0] <= ends[-1] <= greatest):  # also false for NaN
                raise ValueError(f"{name}={value}: give {advice}")


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

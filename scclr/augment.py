"""Two random views of every image: batched, on the images' device, with randomness keyed by (seed, step).

Each operation is torchvision's, with its own parameters for every image. The parameters are a few floats per view,
drawn on the CPU from ``(seed, step)`` alone: a resumed run sees the same views, and so does another device. Which
images an operation touches is therefore known on the CPU, so skipping the others costs no synchronisation.
Normalisation is not here: it belongs to the model, whose frozen encoder takes its statistics along to other datasets.

Dimensions: B images, V = 2 B views, C channels (1 or 3), H x W pixels, S pixels a side of a view.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop falls back to a centre crop after as many


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments; ``stream`` separates independent uses."""
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Augment:
    """A pipeline in SimCLR's order: crop, flip, rotation, colour jitter, grayscale, blur, solarisation.

    Args:
        crop_scale: range of the crop's share of the image's area; ``[1, 1]`` keeps the whole image.
        crop_ratio: range of the crop's aspect ratio, log-uniform.
        flip: probability of a horizontal flip.
        rotation: degrees; the angle is uniform in ``[-rotation, rotation]``, the corners are filled with black.
        jitter: probability of colour jitter, whose four operations come in a random order for every image.
        brightness, contrast, saturation: strength ``x``; the factor is uniform in ``[max(0, 1 - x), 1 + x]``.
        hue: strength in [0, 0.5]; the shift is uniform in ``[-hue, hue]`` turns.
        grayscale: probability of turning grey.
        blur: probability of a Gaussian blur; its standard deviation is uniform in ``blur_sigma`` pixels and its kernel
            spans a tenth of the image (SimCLR, app. A).
        solarize: probability of inverting the pixels of 0.5 and above (BYOL, app. B).

    Raises:
        ValueError: a probability outside [0, 1], an empty range, or a negative strength.
    """

    def __init__(
        self,
        *,
        crop_scale: list[float],
        crop_ratio: list[float],
        flip: float,
        rotation: float,
        jitter: float,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        grayscale: float,
        blur: float,
        blur_sigma: list[float],
        solarize: float,
    ) -> None:
        probabilities = {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur, "solarize": solarize}
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: a probability is in [0, 1]")
        for name, pair in {"crop_scale": crop_scale, "crop_ratio": crop_ratio, "blur_sigma": blur_sigma}.items():
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}={pair}: give [low, high] with 0 < low <= high")
        if crop_scale[1] > 1:
            raise ValueError(f"crop_scale={crop_scale}: a crop cannot be larger than its image")
        strengths = {"rotation": rotation, "brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in strengths.items():
            if value < 0:
                raise ValueError(f"{name}={value}: a strength is at least 0")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue={hue}: give a strength in [0, 0.5]")
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.flip, self.rotation = flip, rotation
        self.moves = crop_scale[0] < 1 or list(crop_ratio) != [1, 1] or flip > 0 or rotation > 0
        self.jitter, self.hue = jitter, hue
        self.strengths = torch.tensor([brightness, contrast, saturation], device="cpu")
        self.grayscale, self.blur, self.blur_sigma, self.solarize = grayscale, blur, blur_sigma, solarize

    def __call__(self, images: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None) -> Tensor:
        """Views of ``images`` uint8 [B, C, H, W] as floats in [0, 1], [2B, C, H, W]: first views, then second ones.

        ``images`` may be a part of the step's batch, from its image ``first`` on, of ``total`` images: the views are
        those that the whole batch would have got.
        """
        n, total = len(images), total or len(images)
        height, width = images.shape[-2:]
        draws = self.draw(2 * total, height, width, generator(seed, step, stream=1))
        if n < total:
            mine = torch.arange(first, first + n)
            draws = Draws(*(values[torch.cat([mine, total + mine])] for values in draws))
        x = images.float().div_(255).repeat(2, 1, 1, 1)  # [2B, C, H, W]
        if self.moves:
            x = resample(x, draws.box, draws.flipped, draws.degrees)
        return self._filter(self._colour(x, draws), draws)

    def draw(self, n: int, height: int, width: int, random: torch.Generator) -> "Draws":
        """The parameters of ``n`` views."""
        low = (1 - self.strengths).clamp_min(0)
        unit = torch.rand(n, 4, generator=random)
        sigma_low, sigma_high = self.blur_sigma
        return Draws(
            box=crop_boxes(n, height, width, self.crop_scale, self.crop_ratio, random),
            flipped=torch.rand(n, generator=random) < self.flip,
            degrees=(2 * torch.rand(n, generator=random) - 1) * self.rotation,
            jittered=torch.rand(n, generator=random) < self.jitter,
            turn=torch.rand(n, 4, generator=random).argsort(1),
            factors=torch.cat([low + unit[:, :3] * (1 + self.strengths - low), (2 * unit[:, 3:] - 1) * self.hue], 1),
            grey=torch.rand(n, generator=random) < self.grayscale,
            blurred=torch.rand(n, generator=random) < self.blur,
            sigma=sigma_low + torch.rand(n, generator=random) * (sigma_high - sigma_low),
            inverted=torch.rand(n, generator=random) < self.solarize,
        )

    def _colour(self, x: Tensor, draws: "Draws") -> Tensor:
        operations: list[Callable[[Tensor, Tensor], Tensor]] = [adjust_brightness, adjust_contrast]
        if x.shape[1] == 3:  # on a grey image the others are the identity, as in torchvision
            operations += [adjust_saturation, adjust_hue]
        for turn in range(4):
            for kind, operation in enumerate(operations):
                if (kind == 3 and self.hue > 0) or (kind < 3 and self.strengths[kind] > 0):
                    chosen = draws.jittered & (draws.turn[:, turn] == kind)
                    x = _apply(x, chosen, operation, draws.factors[:, kind])
        if x.shape[1] == 3:
            x = _apply(x, draws.grey, lambda part: to_grey(part).expand_as(part))
        return x

    def _filter(self, x: Tensor, draws: "Draws") -> Tensor:
        size = max(3, 2 * (min(x.shape[-2:]) // 20) + 1)  # odd
        x = _apply(x, draws.blurred, lambda part, sigma: gaussian_blur(part, sigma, size), draws.sigma)
        return _apply(x, draws.inverted, lambda part: torch.where(part >= 0.5, 1 - part, part))


class Draws(NamedTuple):
    """The random parameters of V views, on the CPU, a row a view."""

    box: Tensor  # [V, 4] top, left, height, width
    flipped: Tensor  # bool [V], as are the others of this kind
    degrees: Tensor  # [V]
    jittered: Tensor
    turn: Tensor  # [V, 4]: which colour operation comes when
    factors: Tensor  # [V, 4]: of brightness, contrast, saturation, hue
    grey: Tensor
    blurred: Tensor
    sigma: Tensor  # [V]
    inverted: Tensor


def _apply(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``x`` with ``operation`` done to the ``chosen`` images (CPU mask [V]), each with its row of ``parameters``."""
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    rows = index.to(x.device, non_blocking=True)
    moved = (p[index].to(x.device, non_blocking=True).view(-1, 1, 1, 1) for p in parameters)
    return x.index_copy(0, rows, operation(x[rows], *moved))


def crop_boxes(
    n: int, height: int, width: int, scale: list[float], ratio: list[float], random: torch.Generator
) -> Tensor:
    """``n`` boxes (top, left, height, width) in whole pixels, float32 [n, 4], as torchvision's RandomResizedCrop.

    An attempt draws an area uniform in ``scale`` and a log-uniform aspect ratio, and is taken if it fits; after ten,
    the largest centred crop whose aspect ratio lies in ``ratio``.
    """
    u = torch.rand(4, CROP_ATTEMPTS, n, generator=random)
    area = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + u[1] * (math.log(ratio[1]) - math.log(ratio[0])))
    w = (area * aspect).sqrt().round()
    h = (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(0, keepdim=True)  # the first attempt that fits
    w, h, u_top, u_left = (value.gather(0, first).squeeze(0) for value in (w, h, u[2], u[3]))
    top, left = (u_top * (height - h + 1)).floor(), (u_left * (width - w + 1)).floor()
    fallback_w, fallback_h = float(width), float(height)
    if width / height < ratio[0]:
        fallback_h = float(round(width / ratio[0]))
    elif width / height > ratio[1]:
        fallback_w = float(round(height * ratio[1]))
    centred = ((height - fallback_h) // 2, (width - fallback_w) // 2, fallback_h, fallback_w)
    drawn = torch.stack([top, left, h, w], 1)
    return torch.where(fits.any(0).unsqueeze(1), drawn, torch.tensor(centred))


def resample(x: Tensor, box: Tensor, flipped: Tensor, degrees: Tensor) -> Tensor:
    """Rotate about the centre, crop to ``box``, resize to the old size and flip, in one bilinear resampling.

    Without rotation this is torchvision's crop, resize (bilinear, not antialiased: a crop is never enlarged to a
    smaller size here) and flip, exactly: the interpolation does not look beyond the box. With rotation it interpolates
    once where torchvision does so twice. What lies outside the image is black.

    Args:
        x: [V, C, H, W]; box: [V, 4] top, left, height, width in pixels; flipped: bool [V]; degrees: [V],
            counter-clockwise.
    """
    n, _, height, width = x.shape
    table = torch.cat([box, flipped.unsqueeze(1), degrees.deg2rad().unsqueeze(1)], 1)  # [V, 6], one transfer
    top, left, h, w, flip, angle = table.to(x.device, non_blocking=True).unbind(1)
    ys = (torch.arange(height, device=x.device) + 0.5) / height  # centres of the view's pixels, as a share of the box
    xs = (torch.arange(width, device=x.device) + 0.5) / width
    xs = torch.lerp(xs, xs.flip(0), flip.unsqueeze(1))  # [V, W]
    # Pixel coordinates in the rotated image, kept between the centres of the box's outermost pixels.
    v = torch.minimum((ys * h.unsqueeze(1)).clamp_min(0.5), h.unsqueeze(1) - 0.5) + top.unsqueeze(1)  # [V, H]
    u = torch.minimum((xs * w.unsqueeze(1)).clamp_min(0.5), w.unsqueeze(1) - 0.5) + left.unsqueeze(1)  # [V, W]
    v, u = (v - height / 2).unsqueeze(2), (u - width / 2).unsqueeze(1)  # from the centre; [V, H, 1], [V, 1, W]
    cos, sin = angle.cos().view(n, 1, 1), angle.sin().view(n, 1, 1)
    grid = torch.stack([(u * cos - v * sin) * (2 / width), (u * sin + v * cos) * (2 / height)], -1)  # [V, H, W, 2]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor).clamp(0, 1)


def to_grey(x: Tensor) -> Tensor:
    """Luma of colour images [V, 3, H, W] -> [V, 1, H, W]; grey images as they are."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """``factor`` [V, 1, 1, 1] times the pixels, clamped to [0, 1]."""
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of each image."""
    return _blend(x, to_grey(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel."""
    return _blend(x, to_grey(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of [V, 3, H, W] by ``shift`` [V, 1, 1, 1] turns in HSV space.

    HSV to RGB is ``channel = v - v s max(0, min(k, 4 - k, 1))`` with ``k = (n + 6 hue) mod 6`` and n = 5, 3, 1.
    """
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0]).to(x.device, non_blocking=True).view(1, 3, 1, 1)
    k = (offsets + sector + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Blur each of [V, C, H, W] with its own standard deviation [V, 1, 1, 1]; ``size`` (odd) taps, reflected edges."""
    n, channels, height, width = x.shape
    taps = torch.arange(size, device=x.device) - size // 2
    weights = torch.exp(-0.5 * (taps / sigma.view(n, 1)) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # [V C, size]
    x = x.reshape(1, n * channels, height, width)
    x = F.pad(x, [size // 2] * 4, mode="reflect")
    x = F.conv2d(x, weights.view(-1, 1, size, 1), groups=n * channels)
    x = F.conv2d(x, weights.view(-1, 1, 1, size), groups=n * channels)
    return x.view(n, channels, height, width)

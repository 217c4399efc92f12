"""Crop, resize, flip and blur as sparse separable resampling. Each output pixel is a weighted sum of a few pixels
(taps) of a column, then of a row, and every view has its own weights.

The sums are embedding bags whose embeddings are the rows of the images. So no crop is copied, and the work is
proportional to the number of taps. Interpolation and antialiasing are torchvision's.

Dimensions: R views, C channels, H x W pixels of an image, S pixels on a side of the view, T taps.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

Taps = Sequence[Tensor]  # positions int32 [R, S, T], and weights [R, S, T]


def separable(x: Tensor, vertical: Taps, horizontal: Taps) -> Tensor:
    """Resample x [B, C, H, W] along its columns, then along its rows. Row r of the taps is for image r mod B.

    Returns:
        The views transposed, [R, C, S of the width, S of the height].
    """
    x = _weighted_sums(x, *vertical)  # [R, C, S, W]
    return _weighted_sums(x.transpose(2, 3), *horizontal)


def _weighted_sums(x: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows of x [B, C, H, W] -> [R, C, S, W]."""
    (images, channels, height, width), (views, size, taps) = x.shape, positions.shape
    planes = torch.arange(0, images * channels * height, height, dtype=torch.int32, device=x.device)
    bags = planes.view(images, channels, 1, 1) + positions.unflatten(0, (-1, images)).unsqueeze(2)  # [V, B, C, S, T]
    weights = weights.unsqueeze(1).expand(-1, channels, -1, -1).reshape(-1, taps)
    image_rows = x.contiguous().view(-1, width)
    sums = F.embedding_bag(bags.view(-1, taps), image_rows, per_sample_weights=weights, mode="sum")
    return sums.view(views, channels, size, width)


def resize_taps(low: Tensor, length: Tensor, full: int, size: int, flipped: Tensor | None = None) -> Taps:
    """The taps that resize ``length`` [R] of ``full`` pixels, from pixel ``low`` [R] on, to ``size`` pixels.

    The resampling is bilinear and antialiased. The filter is a triangle whose half width is one pixel, or
    ``length / size`` pixels where that is larger; pixels outside the crop have no weight. Where ``flipped`` [R] is 1,
    the output is reversed.
    """
    low, length = low.view(-1, 1, 1), length.view(-1, 1, 1)
    taps = 2 * math.ceil(max(1.0, full / size))  # as many as the whole image would need
    relative = (torch.arange(size, device=low.device).view(1, -1, 1) + 0.5) / size
    if flipped is not None:
        relative = torch.lerp(relative, 1 - relative, flipped.view(-1, 1, 1))
    centre = relative * length - 0.5  # [R, S, 1], in pixels from the first one of the crop
    half_width = (length / size).clamp_min(1)
    position = (centre - half_width).floor() + torch.arange(1, taps + 1, device=low.device)  # [R, S, T]
    weights = torch.sub(position, centre).abs_().div_(half_width).neg_().add_(1).clamp_min_(0)
    inside = position.clamp_min(0).minimum(length - 1)
    weights.mul_(inside == position)
    total = reduce(torch.add, weights.unbind(2)).unsqueeze(2)  # faster than a sum of so few
    return inside.add_(low).int(), weights.div_(total)


def blur(x: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Gaussian blur of x [R, C, H, W] by ``size`` taps with reflected edges; ``sigma`` [R] is in pixels."""
    return separable(x, blur_taps(sigma, size, x.shape[2]), blur_taps(sigma, size, x.shape[3])).transpose(2, 3)


def blur_taps(sigma: Tensor, size: int, full: int) -> Taps:
    """``size`` Gaussian taps around each of ``full`` pixels; the edges reflect, and the edge pixel is not repeated."""
    offset = torch.arange(size, device=sigma.device) - size // 2
    position = (torch.arange(full, device=sigma.device).view(-1, 1) + offset).abs()  # [S, T]
    position = (full - 1 - (full - 1 - position).abs()).clamp_min(0)  # 0 where there is a single pixel
    weights = torch.exp(-0.5 * (offset / sigma.view(-1, 1)) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).unsqueeze(1)
    return position.int().expand(len(sigma), -1, -1), weights.expand(-1, full, -1)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate float x [R, C, H, W] counter-clockwise about its centre, bilinearly; pixels from outside are black.

    This is torchvision's ``rotate`` without a fill. Its ``RandomRotation`` fills with 0, which multiplies each pixel by
    the share that lies inside a second time: pixels at the border of the turned image are darker there, by up to 0.25.
    """
    n, _, height, width = x.shape
    angle = degrees.deg2rad().view(n, 1, 1)
    v = (torch.arange(height, device=x.device) + 0.5 - height / 2).view(1, -1, 1)  # from the centre
    u = (torch.arange(width, device=x.device) + 0.5 - width / 2).view(1, 1, -1)
    cos, sin = angle.cos(), angle.sin()
    grid = torch.stack([(u * cos - v * sin) * (2 / width), (u * sin + v * cos) * (2 / height)], -1)  # [R, H, W, 2]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

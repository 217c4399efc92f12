"""Colour jitter and grayscale: torchvision's operations one by one, or all of them as one linear map per view; and
images for an encoder of another number of channels.

Saturation, hue and grayscale are operations on RGB. They leave images of another number of channels as they are, as
torchvision's leave grey ones. Contrast blends such images with the mean of their channels.

Dimensions: R views, C channels.
"""

import math

import torch
from torch import Tensor

from scclr.augment.draws import Draws

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale, of colour images
HUE = 3  # the kind of operation that a shift of the hue is in ``Draws.jitter_order``
PLACES = (0, 1, 2, 1, 2, 3)  # in a view's order, of the blends before the shift of the hue, and of those after it
BLENDS = len(PLACES) + 1  # the last one is grayscale


def luma_of(channels: int) -> Tensor:
    """The weights of the channels in the luma, [C]."""
    return torch.tensor(LUMA if channels == len(LUMA) else (1 / channels,) * channels)


def colour_maps(draws: Draws, channels: int) -> Tensor:
    """Jitter and grayscale of each view as one map: pixel -> M pixel + P m, where m is the mean pixel of the view.

    Brightness, contrast, saturation and grayscale are linear in a pixel and in the mean that contrast blends with, so
    these operations in any order are one matrix for the pixel and one for the mean. Two things differ from doing them
    one by one. Nothing is clamped to [0, 1] before the end, and hue is a rotation about the grey axis of RGB instead of
    a shift in HSV space. The two hues agree for grey pixels and for a third of a turn. Measured on colours uniform in
    RGB: HSV moves a channel by 0.050 on average for a turn of 0.05, and the rotation ends 0.041 away from it (in YIQ
    0.050). For a turn of 0.1 these numbers are 0.100, 0.065 and 0.085.

    Returns:
        M and P side by side, [R, C, 2 C], on the CPU.
    """
    eye, luma = torch.eye(channels), luma_of(channels).expand(channels, -1)
    factors = torch.where(draws.jittered.unsqueeze(1), draws.jitter_factors, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    bright, contrast, saturation, shift = factors.view(-1, 4, 1, 1, 1).unbind(1)  # [R, 1, 1, 1]
    kinds = torch.empty(len(factors), 4, 2, channels, channels)  # what each does to a pixel and to the mean pixel
    kinds[:, 0], kinds[:, 1, :1] = bright * eye, contrast * eye
    kinds[:, 1, 1:] = torch.lerp(luma, eye, contrast)  # a pixel is blended with the mean pixel's luma
    kinds[:, 2:] = eye
    if channels == 3:
        kinds[:, 2], kinds[:, 3] = torch.lerp(luma, eye, saturation), hue_turns(shift)
    in_order = kinds[torch.arange(len(factors)).unsqueeze(1), draws.jitter_order]
    first, second, third, fourth = in_order.unbind(1)  # [R, 2, C, C]
    maps = fourth @ third @ (second @ first)
    if channels == 3:
        maps = torch.where(draws.grey.view(-1, 1, 1, 1), luma @ maps, maps)
    pixel, mean = maps.unbind(1)
    return torch.cat([pixel, mean - pixel], 2)


def hue_turns(shift: Tensor) -> Tensor:
    """Rotations about the grey axis by ``shift`` [.., 1, 1] turns, [.., 3, 3]; a third of a turn maps red to green."""
    channel = torch.arange(3)
    return (1 + 2 * torch.cos(2 * math.pi * (shift - (channel.view(-1, 1) - channel) / 3))) / 3


def linear(x: Tensor, maps: Tensor) -> Tensor:
    """Apply ``colour_maps`` [R, C, 2 C] to x [R, C, H, W]; the result is not clamped."""
    pixels = x.flatten(2)  # [R, C, H W]
    pixel, mean = maps.chunk(2, 2)
    return torch.baddbmm(mean @ pixels.mean(2, keepdim=True), pixel, pixels).view_as(x)


def colour_steps(draws: Draws, channels: int) -> Tensor:
    """Jitter and grayscale of each view as the same sequence of operations for all: ``recolour`` carries them out.

    Brightness, contrast, saturation and grayscale blend a view with black, its mean luma or the luma of each pixel. So
    the sequence is three blends, a shift of the hue, and four blends: a view's order puts up to three of them before
    the hue, or after it. What a view does not do has the factor 1, which changes no bit.

    Returns:
        On the CPU, [R, 7 (C + 2) + 5]: for each blend the C weights of the luma, which are 0 for black, whether it is
        the luma of each pixel, and the factor; then n of ``adjust_hue`` for each channel, 6 times the shift, and
        whether the hue is shifted.
    """
    places, order = torch.tensor(PLACES), draws.jitter_order
    hue_at = (order == HUE).int().argmax(1, keepdim=True)  # [R, 1]
    kinds = order[:, places]  # [R, 6]
    active = draws.jittered.unsqueeze(1) & torch.cat([places[:3] < hue_at, places[3:] > hue_at], 1)
    grey = draws.grey.unsqueeze(1)
    if channels != 3:
        active, grey = active & (kinds != 2), torch.zeros_like(grey)
    factors = torch.where(active, draws.jitter_factors.gather(1, kinds), 1.0)
    kinds = torch.cat([kinds, torch.full_like(hue_at, 2)], 1)  # grayscale is a saturation of 0
    factors = torch.cat([factors, 1 - grey.float()], 1)
    weights = (kinds != 0).unsqueeze(2) * luma_of(channels)  # [R, 7, C]
    blends = torch.cat([weights, (kinds == 2).unsqueeze(2), factors.unsqueeze(2)], 2)
    hue = 6 * draws.jitter_factors[:, HUE:]
    offsets = torch.tensor([5.0, 3.0, 1.0]).expand(len(hue), -1)
    return torch.cat([blends.flatten(1), offsets, hue, draws.jittered.unsqueeze(1)], 1)


def recolour(x: Tensor, steps: Tensor) -> Tensor:
    """Apply ``colour_steps`` [R, 7 (C + 2) + 5] to x [R, C, H, W], clamped to [0, 1] after each."""
    channels = x.shape[1]
    blends, hue = steps[:, :-5].unflatten(1, (BLENDS, channels + 2, 1, 1)), steps[:, -5:].unflatten(1, (5, 1, 1))
    for number, (weights, by_pixel, factor) in enumerate(part.split([channels, 1, 1], 1) for part in blends.unbind(1)):
        if number == 3 and channels == 3:
            x = torch.where(hue[:, 4:] > 0, _shift_hue(x, *hue[:, :4].split([3, 1], 1)), x)
        luma = (x * weights).sum(1, keepdim=True)
        other = torch.lerp(luma.mean((2, 3), keepdim=True), luma, by_pixel)
        x = torch.lerp(other, x, factor).clamp_(0, 1)
    return x


def _shift_hue(x: Tensor, n: Tensor, sectors: Tensor) -> Tensor:
    """``adjust_hue`` in fewer operations; ``n`` is [R, 3, 1, 1], and ``sectors`` are 6 shift."""
    value, largest = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    beside = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, largest)  # G - B where R is largest, B - R, R - G
    sector = torch.addcdiv(largest * 2.0, beside, chroma.clamp_min(1e-30))
    k = (n + sector + sectors) % 6
    return value.addcmul(chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor).clamp(0, 1)


def to_grey(x: Tensor) -> Tensor:
    """Luma [R, 1, H, W] of float images [R, C, H, W]; the mean of their channels if there are not three."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True) if x.shape[1] > 1 else x
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Images [R, 1 or 3, H, W] for an encoder of 1 or 3 channels: luma of colour images, or grey ones three times.

    Luma of uint8 images is rounded to uint8.
    """
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    return to_grey(x.float()).round().byte() if x.dtype == torch.uint8 else to_grey(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the pixels by ``factor`` [R, 1, 1, 1], and clamp to [0, 1]."""
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of each image."""
    return _blend(x, to_grey(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel."""
    return _blend(x, to_grey(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of x [R, 3, H, W] by ``shift`` [R, 1, 1, 1] turns in HSV space.

    RGB is ``v - v s max(0, min(k, 4 - k, 1))`` of HSV, with ``k = (n + 6 hue) mod 6`` and n = 5, 3, 1.
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
    offsets = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (offsets + sector + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

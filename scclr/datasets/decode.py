"""From an opened image file to uint8 pixels of the size that is asked for.

Dimensions: V views, S pixels a side.
"""

import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

GAP = 2  # a JPEG may be reduced while decoding to this many times what is needed: close to a fair resampling (Pillow)
# Pillow's decoders raise all of these on damaged files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def centre(image: Image.Image, resize: int, size: int) -> Tensor:
    """Shorter side to ``resize``, then the centre, as torchvision's Resize and CenterCrop: uint8 [3, size, size]."""
    short, long = sorted(image.size)
    longer = int(resize * long / short)
    height, width = (longer, resize) if image.height > image.width else (resize, longer)
    pixels = resized(decode(image, short / resize), height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[:, top : top + size, left : left + size]


def crops(image: Image.Image, boxes: Tensor, side: int) -> Tensor:
    """The ``boxes`` [V, 4] (top, left, height, width in pixels) of an image, decoded once: [V, 3, side, side]."""
    height, width = image.height, image.width
    pixels = decode(image, boxes[:, 2:].min().item() / side)
    down, across = pixels.shape[1] / height, pixels.shape[2] / width  # 1, unless the decoder reduced it
    views = torch.empty(len(boxes), 3, side, side, dtype=torch.uint8)
    for view, (top, left, h, w) in zip(views, boxes.tolist(), strict=True):
        part = pixels[:, round(top * down) : round((top + h) * down), round(left * across) : round((left + w) * across)]
        view.copy_(resized(part, side, side))
    return views


def decode(image: Image.Image, room: float) -> Tensor:
    """RGB, uint8 [3, h, w], stored pixel by pixel; smaller where a JPEG has ``room`` times the pixels needed a side.

    torchvision's own decoder takes 0.85 ms where this takes 1.0 (500 x 334, one thread), gives it back in resizing, and
    is deprecated from 0.29 on.
    """
    if room >= 2 * GAP:
        image.draft("RGB", (int(image.width * GAP / room), int(image.height * GAP / room)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """``pixels`` uint8 [C, h, w] as [C, height, width], bilinear and antialiased."""
    return F.interpolate(pixels.unsqueeze(0), (height, width), mode="bilinear", antialias=True).squeeze(0)

"""Random views of every image: batched, on the images' device, with randomness that is a function of (seed, step).

Every view has its own parameters, a few floats that are drawn on the CPU from ``(seed, step)`` alone. So a resumed run
sees the same views, and so does another device. The CPU therefore knows which views an operation changes, and the
others are skipped without waiting for the device. Normalization is not here but in the model, because a frozen encoder
takes its statistics along to other datasets.

Dimensions: B images, V views of each, R = V B rows, C channels (1 or 3), H x W pixels, S pixels on a side of a view.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scclr.augment.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_maps,
    linear,
    to_grey,
    with_channels,
)
from scclr.augment.draws import CROP_ATTEMPTS, Draws
from scclr.augment.geometry import blur, resize_taps, rotate, separable

__all__ = ["Augment", "Draws", "Recipe", "generator", "with_channels"]

ORDER_STREAM, VIEW_STREAM, SAMPLE_STREAM = 0, 1, 2  # independent uses of ``generator``
CPU_CHUNK_FLOATS = 2**20  # in work at once on a CPU: 4 MiB stay in its caches, a whole batch of photographs does not
RANGES = {
    "crop_scale": (1e-4, 1), "crop_ratio": (0.01, 100), "flip": (0, 1), "rotation": (0, 180), "jitter": (0, 1),
    "brightness": (0, 10), "contrast": (0, 10), "saturation": (0, 10), "hue": (0, 0.5), "grayscale": (0, 1),
    "blur": (0, 1), "blur_sigma": (1e-3, 1000), "solarize": (0, 1),
}  # fmt: skip
MAX_SIZE = 10_000


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments; ``stream`` separates independent uses."""
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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


@dataclass(frozen=True, kw_only=True)
class Augment(Recipe):
    """The views of an image: one recipe, and what each view changes in it.

    Args:
        views: what differs from the recipe, for every view; ``[{}, {}]`` is SimCLR's pair, and
            ``[{blur: 1}, {blur: 0.1, solarize: 0.2}]`` is BYOL's.
        size: pixels on a side of the view, from 1 to 10000, antialiased where a crop is larger; None is the size of the
            images.
        exact: whether colour operations are done one by one as torchvision defines them, clamped after each and with
            hue in HSV space, or as one linear map (``colour_maps``). Geometry and blur are torchvision's in both cases.

    Raises:
        ValueError: as ``Recipe``, also for the recipe of a view; for fewer than two views, a name in them that is not
            part of a recipe, or a size out of range.
    """

    views: list[dict[str, Any]]
    size: int | None
    exact: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.views) < 2:
            raise ValueError(
                f"views={self.views}: a pair needs two views or more; [{{}}, {{}}] makes two of one recipe"
            )
        for changes in self.views:
            if unknown := set(changes) - set(RANGES):
                raise ValueError(f"views: {min(unknown)} is not part of a recipe; it has {', '.join(RANGES)}")
        integer = isinstance(self.size, int) and not isinstance(self.size, bool)
        if self.size is not None and not (integer and 1 <= self.size <= MAX_SIZE):
            raise ValueError(f"size={self.size}: give pixels from 1 to {MAX_SIZE}, or null for the size of the images")
        assert self.recipes  # this checks the recipe of every view

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The recipe of every view."""
        base = {name: value for name, value in asdict(self).items() if name in RANGES}
        return [Recipe(**{**base, **changes}) for changes in self.views]

    def __call__(self, images: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None) -> Tensor:
        """Views of ``images`` uint8 [B, C, H, W] as floats in [0, 1], [V B, C, S, S] in channels_last: all first views,
        then all second ones.

        ``images`` may be a part of the step's batch of ``total`` images, from image ``first`` on. The views are those
        that the whole batch would get. ``images`` may also be the crops of these views, [B, V, C, S, S], which
        ``Draws.boxes`` were applied to.

        Raises:
            ValueError: crops for a recipe with a rotation, which comes before the crop.
        """
        draws = self.draw(total or len(images), seed=seed, step=step)
        draws = draws.select_images(len(self.views), slice(first, first + len(images)))
        if images.ndim == 4:
            return self._render(images, draws, draws.boxes(*images.shape[2:]))
        if any(recipe.rotation > 0 for recipe in self.recipes):
            raise ValueError("rotation comes before the crop: it needs whole images")
        crops = images.transpose(0, 1).flatten(0, 1)  # [V B, C, S, S]
        whole = torch.tensor([[0.0, 0.0, *crops.shape[2:]]]).expand(len(crops), -1)
        return self._render(crops, draws, whole)

    def draw(self, total: int, *, seed: int, step: int) -> Draws:
        """The parameters of all views of a step's ``total`` images."""
        random, shape = generator(seed, step, VIEW_STREAM), (len(self.views), total)

        def each(name: str) -> Tensor:  # [V, 1], or [V, 1, 2] for a range
            return torch.tensor([[getattr(recipe, name)] for recipe in self.recipes], dtype=torch.float32)

        def uniform(*size: int) -> Tensor:
            return torch.rand(*shape, *size, generator=random)

        def between(ends: Sequence[Tensor], share: Tensor) -> Tensor:
            return ends[0] + share * (ends[1] - ends[0])

        def chance(name: str) -> Tensor:
            return uniform() < each(name)

        # From here on the order of the lines is the order of the random numbers.
        factor, ratio = uniform(4), each("crop_ratio")
        crop = torch.rand(4, CROP_ATTEMPTS, *shape, generator=random).movedim(1, 3)  # [4, V, B, attempts]
        strength = torch.stack([each(name) for name in ("brightness", "contrast", "saturation")], 2)  # [V, 1, 3]
        factors = between(((1 - strength).clamp_min(0), 1 + strength), factor[..., :3])
        shifts = (2 * factor[..., 3:] - 1) * each("hue").unsqueeze(2)
        draws: Sequence[Tensor] = Draws(
            crop_area=between(each("crop_scale").split(1, 2), crop[0]),
            crop_aspect=between(ratio.log().split(1, 2), crop[1]).exp(),
            crop_position=crop[2:].movedim(0, 3),
            crop_ratio=ratio.expand(*shape, 2),
            flipped=chance("flip"),
            degrees=(2 * uniform() - 1) * each("rotation"),
            jittered=chance("jitter"),
            jitter_order=uniform(4).argsort(2),
            jitter_factors=torch.cat([factors, shifts], 2),
            grey=chance("grayscale"),
            blurred=chance("blur"),
            sigma=between(each("blur_sigma").unbind(2), uniform()),
            solarized=chance("solarize"),
        )
        return Draws(*(values.flatten(0, 1) for values in draws))

    def _render(self, source: Tensor, draws: Draws, boxes: Tensor) -> Tensor:
        """Views of ``source`` uint8 [B, C, H, W] with ``boxes`` [R, 4], where row r is of image r mod B; on a CPU in
        chunks.

        Cropped views are transposed, [.., W, H], until they are written: that saves a transposition.
        """
        count, (channels, height, width), device = len(source), source.shape[1:], source.device
        maps = [] if self.exact else [colour_maps(draws, channels).flatten(1)]
        table = torch.cat([boxes, draws.flipped.unsqueeze(1), draws.degrees.unsqueeze(1), *maps], 1)
        table = table.to(device, non_blocking=True)  # one transfer
        top, left, box_height, box_width, flipped, degrees = table[:, :6].unbind(1)
        vertical = resize_taps(top, box_height, height, self.size or height)
        horizontal = resize_taps(left, box_width, width, self.size or width, flipped)
        size = (len(boxes), channels, self.size or height, self.size or width)
        out = torch.empty(size, device=device, memory_format=torch.channels_last)
        chunks = math.ceil(count * out[0].numel() / CPU_CHUNK_FLOATS) if device.type == "cpu" else 1
        chunk = math.ceil(count / chunks)
        for first in range(0, count, chunk):
            images = source[first : first + chunk].float().div_(255)
            for start in range(first, len(boxes), count):  # this chunk in every view
                rows = slice(start, start + len(images))
                x = rotate(images, degrees[rows]) if any(recipe.rotation > 0 for recipe in self.recipes) else images
                x = separable(x, [taps[rows] for taps in vertical], [taps[rows] for taps in horizontal])
                if self.exact:
                    x = self._colour(x, draws, rows)
                elif any(recipe.jitter > 0 or recipe.grayscale > 0 for recipe in self.recipes):
                    x = linear(x, table[rows, 6:].unflatten(1, (channels, -1))).clamp_(0, 1)
                out[rows] = self._filter(x, draws, rows).transpose(2, 3)
        return out

    def _colour(self, x: Tensor, draws: Draws, rows: slice) -> Tensor:
        operations: list[Callable[[Tensor, Tensor], Tensor]] = [adjust_brightness, adjust_contrast]
        if x.shape[1] == 3:  # on a grey image the others are the identity, as in torchvision
            operations += [adjust_saturation, adjust_hue]
        for position in range(4):
            for kind, operation in enumerate(operations):
                chosen = draws.jittered[rows] & (draws.jitter_order[rows, position] == kind)
                x = _apply(x, chosen, operation, draws.jitter_factors[rows, kind].view(-1, 1, 1, 1))
        if x.shape[1] == 3:
            x = _apply(x, draws.grey[rows], lambda part: to_grey(part).expand_as(part))
        return x

    def _filter(self, x: Tensor, draws: Draws, rows: slice) -> Tensor:
        size = max(3, 2 * (min(x.shape[-2:]) // 20) + 1)  # odd
        x = _apply(x, draws.blurred[rows], lambda part, sigma: blur(part, sigma, size), draws.sigma[rows])
        return _apply(x, draws.solarized[rows], lambda part: torch.where(part >= 0.5, 1 - part, part))


def _apply(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``x`` with ``operation`` applied to the ``chosen`` views (CPU mask [R]), each with its row of ``parameters``."""
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    rows = index.to(x.device, non_blocking=True)
    moved = (p[index].to(x.device, non_blocking=True) for p in parameters)
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), *moved))

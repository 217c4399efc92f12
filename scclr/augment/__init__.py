"""Random views of every image: batched, on the images' device, with randomness keyed by (seed, step).

Every view has parameters of its own, a few floats that are drawn on the CPU from ``(seed, step)`` alone: a resumed run
sees the same views, and so does another device. Which views an operation touches is therefore known on the CPU, so
skipping the others costs no synchronisation. Normalisation is not here: it belongs to the model, whose frozen encoder
takes its statistics along to other datasets.

Dimensions: B images, V views of each, R = V B rows, C channels (1 or 3), H x W pixels, S on the side of a view.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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
)
from scclr.augment.draws import CROP_ATTEMPTS, Draws
from scclr.augment.geometry import blur, resize_taps, rotate, separable

# Views in work at once on a CPU, in floats: 4 MiB stay in its caches, a whole batch of photographs does not.
CHUNK = 2**20


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments; ``stream`` separates independent uses."""
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a view is made, in SimCLR's order: rotation, crop, flip, colour jitter, grayscale, blur, solarisation.

    Args:
        crop_scale: range of the crop's share of the image's area; ``[1, 1]`` keeps the whole image.
        crop_ratio: range of the crop's aspect ratio, log-uniform.
        flip: probability of a horizontal flip.
        rotation: degrees; the angle is uniform in ``[-rotation, rotation]``, the corners are filled with black.
        jitter: probability of colour jitter, whose four operations come in a random order for every view.
        brightness, contrast, saturation: strength ``x``; the factor is uniform in ``[max(0, 1 - x), 1 + x]``.
        hue: strength in [0, 0.5]; the shift is uniform in ``[-hue, hue]`` turns.
        grayscale: probability of turning grey.
        blur: probability of a Gaussian blur; its standard deviation is uniform in ``blur_sigma`` pixels and its kernel
            spans a tenth of the view (SimCLR, app. A).
        solarize: probability of inverting the pixels of 0.5 and above (BYOL, app. B).

    Raises:
        ValueError: not a number, a probability outside [0, 1], an empty range, or a negative strength.
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
        for name in RECIPE:
            value = getattr(self, name)
            if name in ("crop_scale", "crop_ratio", "blur_sigma"):
                if not _is_range(value):
                    raise ValueError(f"{name}={value}: give [low, high] with 0 < low <= high")
            elif not isinstance(value, int | float):
                raise ValueError(f"{name}={value}: give a number")
            elif name in ("flip", "jitter", "grayscale", "blur", "solarize") and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: a probability is in [0, 1]")
            elif value < 0:
                raise ValueError(f"{name}={value}: a strength is at least 0")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale={self.crop_scale}: a crop cannot be larger than its image")
        if self.hue > 0.5:
            raise ValueError(f"hue={self.hue}: give a strength in [0, 0.5]")


RECIPE = tuple(field.name for field in fields(Recipe))


def _is_range(value: object) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
        return False
    return bool(0 < value[0] <= value[1])


@dataclass(frozen=True, kw_only=True)
class Augment(Recipe):
    """The views of an image: one recipe, and what each view changes in it.

    Args:
        views: for every view what differs from the recipe; ``[{}, {}]`` is SimCLR's pair,
            ``[{blur: 1}, {blur: 0.1, solarize: 0.2}]`` is BYOL's.
        size: pixels on the side of a view, antialiased where a crop shrinks to it; None is the images' own size.
        exact: colour operations one by one as torchvision defines them, clamped after each and hue in HSV space,
            instead of one linear map (``colour_maps``). The geometry and the blur are torchvision's in both cases.

    Raises:
        ValueError: as ``Recipe``; fewer than two views, a name in them that is no part of a recipe, or a size below 1.
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
            for name in changes:
                if name not in RECIPE:
                    raise ValueError(f"views: {name} is no part of a recipe; it has {', '.join(RECIPE)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size}: give a number of pixels, or null for the images' own")
        assert self.recipes  # every view's is checked

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The recipe of every view."""
        base = {name: value for name, value in asdict(self).items() if name in RECIPE}
        return [Recipe(**{**base, **changes}) for changes in self.views]

    def __call__(self, images: Tensor, *, seed: int, step: int, first: int = 0, total: int | None = None) -> Tensor:
        """Views of ``images`` uint8 [B, C, H, W] as floats in [0, 1], [V B, C, S, S] in channels_last: first views,
        then second ones.

        ``images`` may be a part of the step's batch, from its image ``first`` on, of ``total`` images: the views are
        those that the whole batch would have got. They may also be the crops of these views, [B, V, C, S, S]:
        ``finish`` does the rest.
        """
        draws = self.draw(total or len(images), seed=seed, step=step)
        draws = draws.of(len(self.views), slice(first, first + len(images)))
        if images.ndim == 5:
            return self.finish(images.transpose(0, 1).flatten(0, 1), draws)
        return self._render(images, draws, draws.boxes(*images.shape[2:]))

    def finish(self, crops: Tensor, draws: Draws) -> Tensor:
        """As a call, from ``crops`` uint8 [V B, C, S, S] that ``draws.boxes`` has been applied to, a row a view.

        Raises:
            ValueError: a recipe with a rotation, which comes before the crop.
        """
        if any(recipe.rotation > 0 for recipe in self.recipes):
            raise ValueError("rotation comes before the crop: it needs whole images")
        height, width = crops.shape[2:]
        return self._render(crops, draws, torch.tensor([[0.0, 0.0, height, width]]).expand(len(crops), -1))

    def draw(self, total: int, *, seed: int, step: int) -> Draws:
        """The parameters of all views of a step's ``total`` images."""
        random, shape = generator(seed, step, stream=1), (len(self.views), total)

        def each(name: str) -> Tensor:  # [V, 1], or [V, 1, 2] for a range
            return torch.tensor([[getattr(recipe, name)] for recipe in self.recipes], dtype=torch.float32)

        def uniform(*size: int) -> Tensor:
            return torch.rand(*shape, *size, generator=random)

        def between(ends: Sequence[Tensor], share: Tensor) -> Tensor:
            return ends[0] + share * (ends[1] - ends[0])

        def chance(name: str) -> Tensor:
            return uniform() < each(name)

        strength = torch.stack([each(name) for name in ("brightness", "contrast", "saturation")], 2)  # [V, 1, 3]
        unit, ratio = uniform(4), each("crop_ratio")
        crop = torch.rand(4, CROP_ATTEMPTS, *shape, generator=random).movedim(1, 3)  # [4, V, B, attempts]
        found: Sequence[Tensor] = Draws(
            area=between(each("crop_scale").split(1, 2), crop[0]),
            aspect=between(ratio.log().split(1, 2), crop[1]).exp(),
            place=crop[2:].movedim(0, 3),
            ratio=ratio.expand(*shape, 2),
            flipped=chance("flip"),
            degrees=(2 * uniform() - 1) * each("rotation"),
            jittered=chance("jitter"),
            turn=uniform(4).argsort(2),
            factors=torch.cat(
                [
                    between(((1 - strength).clamp_min(0), 1 + strength), unit[..., :3]),
                    (2 * unit[..., 3:] - 1) * each("hue").unsqueeze(2),
                ],
                2,
            ),
            grey=chance("grayscale"),
            blurred=chance("blur"),
            sigma=between(each("blur_sigma").unbind(2), uniform()),
            inverted=chance("solarize"),
        )
        return Draws(*(values.flatten(0, 1) for values in found))

    def _render(self, source: Tensor, draws: Draws, box: Tensor) -> Tensor:
        """Views of ``source`` uint8 [B, C, H, W], row r of image r mod B, with ``box`` [R, 4]; on a CPU in chunks.

        Cropped views lie on their side, [.., W, H], until they are written: that saves a transposition.
        """
        count, (channels, height, width), device = len(source), source.shape[1:], source.device
        maps = [] if self.exact else [colour_maps(draws, channels).flatten(1)]
        table = torch.cat([box, draws.flipped.unsqueeze(1), draws.degrees.unsqueeze(1), *maps], 1)
        table = table.to(device, non_blocking=True)  # one transfer
        top, left, high, wide, flipped, degrees = table[:, :6].unbind(1)
        down = resize_taps(top, high, height, self.size or height)
        across = resize_taps(left, wide, width, self.size or width, flipped)
        size = (len(box), channels, self.size or height, self.size or width)
        out = torch.empty(size, device=device, memory_format=torch.channels_last)
        parts = math.ceil(count * out[0].numel() / CHUNK) if device.type == "cpu" else 1
        step = math.ceil(count / parts)
        for first in range(0, count, step):
            images = source[first : first + step].float().div_(255)
            for start in range(first, len(box), count):  # the chunk in every view
                rows = slice(start, start + len(images))
                x = rotate(images, degrees[rows]) if any(recipe.rotation > 0 for recipe in self.recipes) else images
                x = separable(x, [part[rows] for part in down], [part[rows] for part in across])
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
        for turn in range(4):
            for kind, operation in enumerate(operations):
                chosen = draws.jittered[rows] & (draws.turn[rows, turn] == kind)
                x = _apply(x, chosen, operation, draws.factors[rows, kind].view(-1, 1, 1, 1))
        if x.shape[1] == 3:
            x = _apply(x, draws.grey[rows], lambda part: to_grey(part).expand_as(part))
        return x

    def _filter(self, x: Tensor, draws: Draws, rows: slice) -> Tensor:
        size = max(3, 2 * (min(x.shape[-2:]) // 20) + 1)  # odd
        x = _apply(x, draws.blurred[rows], lambda part, sigma: blur(part, sigma, size), draws.sigma[rows])
        return _apply(x, draws.inverted[rows], lambda part: torch.where(part >= 0.5, 1 - part, part))


def _apply(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``x`` with ``operation`` done to the ``chosen`` views (CPU mask [R]), each with its row of ``parameters``."""
    index = chosen.nonzero().squeeze(1)
    if len(index) == 0:
        return x
    rows = index.to(x.device, non_blocking=True)
    moved = (p[index].to(x.device, non_blocking=True) for p in parameters)
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), *moved))

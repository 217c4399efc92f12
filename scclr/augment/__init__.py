"""Random views of every image: batched, on the images' device, with randomness that is a function of (seed, step).

Every view has its own parameters, a few floats that are drawn on the CPU from ``(seed, step)`` alone. So a resumed run
sees the same views, and so does another device. On a CPU, an operation is done on the views that it changes. A GPU
would have to be told which ones, at each operation. There all views go through the same operations, whose parameters
travel together (``Augment.render``). Both give the same views to rounding. Normalization is not here but in the model,
because a frozen encoder takes its statistics along to other datasets.

Dimensions: B images, V views of each, R = V B rows, C channels, H x W pixels, S pixels on a side of a view.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from scclr.augment.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    colour_maps,
    colour_steps,
    linear,
    recolour,
    to_grey,
    with_channels,
)
from scclr.augment.draws import CROP_ATTEMPTS, RANGES, Draws, Recipe
from scclr.augment.geometry import blur, resize_taps, rotate, separable

__all__ = ["RANGES", "Augment", "Draws", "Recipe", "generator", "with_channels"]

ORDER_STREAM, VIEW_STREAM, SAMPLE_STREAM = 0, 1, 2  # independent uses of ``generator``
CPU_CHUNK_FLOATS = 2**20  # in work at once on a CPU: 4 MiB stay in its caches, a whole batch of photographs does not
MAX_SIZE = 10_000


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments; ``stream`` separates independent uses."""
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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
        ValueError: as ``Recipe``, also for the recipe of a view; for no views, a name in them that is not part of a
            recipe, or a size out of range.
    """

    views: list[dict[str, Any]]
    size: int | None
    exact: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.views:
            raise ValueError("views=[]: give one or more; [{}] makes one by the recipe")
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
        total = total or len(images)
        if images.device.type != "cpu" or "render" in vars(self):
            table = self.prepare(images, seed=seed, step=step, total=total).unflatten(1, (len(self.views), total))
            table = table[:, :, first : first + len(images)].flatten(1)
            return self.render(images if images.ndim == 4 else images.transpose(0, 1).flatten(0, 1), table)
        draws = self._draws(total, seed, step).select_images(len(self.views), slice(first, first + len(images)))
        if images.ndim == 4:
            return self._render_on_cpu(images, draws, draws.boxes(*images.shape[2:]))
        crops = images.transpose(0, 1).flatten(0, 1)  # [V B, C, S, S]
        return self._render_on_cpu(crops, draws, self._boxes(images, draws))

    def compiled(self, **options: Any) -> Self:
        """This augmentation with ``render`` compiled by ``torch.compile``, also on a CPU.

        It is compiled for each number of images, of which a training has two at most. One graph for any number would
        take many times as long to compile.
        """
        copy = replace(self)
        vars(copy)["render"] = torch.compile(self.render, fullgraph=True, dynamic=False, **options)
        return copy

    def prepare(self, images: Tensor, *, seed: int, step: int, total: int) -> Tensor:
        """The parameters of all views of ``total`` images like ``images``, as ``render`` takes them, on their device.

        They are kept until those of another step are asked for. So all parts of a batch share them, and they can be
        sent ahead. The device is not waited for: they leave from pinned memory.
        """
        device, shape = images.device, tuple(images.shape[1:])
        key = seed, step, total, shape, device
        if (kept := vars(self).get("_prepared")) is None or kept[0] != key:
            draws, channels = self._draws(total, seed, step), shape[-3]
            drawn = [draws.flipped, draws.degrees, draws.sigma, draws.blurred, draws.solarized]
            rows = [self._boxes(images, draws).T, torch.zeros(1, len(draws.sigma)), torch.stack(drawn)]
            if any(recipe.jitter > 0 or recipe.grayscale > 0 for recipe in self.recipes):
                rows += [colour_steps(draws, channels).T if self.exact else colour_maps(draws, channels).flatten(1).T]
            pinned = device.type == "cuda" and torch.cuda.is_available()
            table = torch.empty(sum(map(len, rows)), len(draws.sigma), pin_memory=pinned)
            kept = key, torch.cat(rows, out=table).to(device, non_blocking=True)
            vars(self)["_prepared"] = kept
        prepared: Tensor = kept[1]
        return prepared

    def _draws(self, total: int, seed: int, step: int) -> Draws:
        """``draw``, kept until another step's is asked for: the parts of a batch have it in common."""
        key = total, seed, step
        if (kept := vars(self).get("_drawn")) is None or kept[0] != key:
            kept = key, self.draw(total, seed=seed, step=step)
            vars(self)["_drawn"] = kept
        draws: Draws = kept[1]
        return draws

    def _boxes(self, images: Tensor, draws: Draws) -> Tensor:
        """The crops that ``images`` are still to be cut to, [R, 4].

        Raises:
            ValueError: as ``__call__``.
        """
        if images.ndim == 4:
            return draws.boxes(*images.shape[2:])
        if any(recipe.rotation > 0 for recipe in self.recipes):
            raise ValueError("rotation comes before the crop: it needs whole images")
        return torch.tensor([[0.0, 0.0, *images.shape[3:]]]).expand(len(draws.sigma), -1)

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

    def render(self, source: Tensor, table: Tensor) -> Tensor:
        """Views of ``source`` uint8 [B, C, H, W] by a ``table`` [parameters, R], where column r is for image r mod B.

        Every operation is done on all views, and a view that it is not for gets what leaves it unchanged. So the
        operations depend on the recipe and on shapes alone.
        """
        count, _, height, width = source.shape
        copies, size = table.shape[1] // count, (self.size or height, self.size or width)
        degrees, sigma, blurred, solarized = table[6:10].unbind()
        x = source.float().div_(255)
        if any(recipe.rotation > 0 for recipe in self.recipes):
            x = rotate(x.repeat(copies, 1, 1, 1), degrees)
        if (height, size[0]) == (width, size[1]):  # both axes at once
            both = resize_taps(table[:2].flatten(), table[2:4].flatten(), height, size[0], table[4:6].flatten())
            taps = [[part.chunk(2)[axis] for part in both] for axis in (0, 1)]
        else:
            taps = [
                list(resize_taps(table[axis], table[2 + axis], full, size[axis], table[4 + axis]))
                for axis, full in enumerate((height, width))
            ]
        x = separable(x, *taps)  # transposed until the end: that saves a transposition
        if len(colours := table[10:]) > 0 and self.exact:
            x = recolour(x, colours.T)
        elif len(colours) > 0:
            x = linear(x, colours.T.unflatten(1, (x.shape[1], -1))).clamp_(0, 1)
        if any(recipe.blur > 0 for recipe in self.recipes):
            x = torch.where(blurred.view(-1, 1, 1, 1) > 0, blur(x, sigma, self._blur_size(x)), x)
        if any(recipe.solarize > 0 for recipe in self.recipes):
            x = torch.where((solarized.view(-1, 1, 1, 1) > 0) & (x >= 0.5), 1 - x, x)
        return x.transpose(2, 3).contiguous(memory_format=torch.channels_last)

    def _render_on_cpu(self, source: Tensor, draws: Draws, boxes: Tensor) -> Tensor:
        """What ``render`` gives, by the views that each operation changes, and in chunks that fit a core's caches."""
        count, (channels, height, width) = len(source), source.shape[1:]
        maps = [] if self.exact else [colour_maps(draws, channels).flatten(1)]
        table = torch.cat([boxes, draws.flipped.unsqueeze(1), draws.degrees.unsqueeze(1), *maps], 1)
        top, left, box_height, box_width, flipped, degrees = table[:, :6].unbind(1)
        vertical = resize_taps(top, box_height, height, self.size or height)
        horizontal = resize_taps(left, box_width, width, self.size or width, flipped)
        size = (len(boxes), channels, self.size or height, self.size or width)
        out = torch.empty(size, memory_format=torch.channels_last)
        chunk = math.ceil(count / math.ceil(count * out[0].numel() / CPU_CHUNK_FLOATS))
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
        if x.shape[1] == 3:
            operations += [adjust_saturation, adjust_hue]
        for position in range(4):
            for kind, operation in enumerate(operations):
                chosen = draws.jittered[rows] & (draws.jitter_order[rows, position] == kind)
                x = _apply(x, chosen, operation, draws.jitter_factors[rows, kind].view(-1, 1, 1, 1))
        if x.shape[1] == 3:
            x = _apply(x, draws.grey[rows], lambda part: to_grey(part).expand_as(part))
        return x

    @staticmethod
    def _blur_size(x: Tensor) -> int:
        return max(3, 2 * (min(x.shape[-2:]) // 20) + 1)  # odd

    def _filter(self, x: Tensor, draws: Draws, rows: slice) -> Tensor:
        size = self._blur_size(x)
        x = _apply(x, draws.blurred[rows], lambda part, sigma: blur(part, sigma, size), draws.sigma[rows])
        return _apply(x, draws.solarized[rows], lambda part: torch.where(part >= 0.5, 1 - part, part))


def _apply(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``x`` with ``operation`` applied to the ``chosen`` views (mask [R]), each with its row of ``parameters``."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return x
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), *(p[rows] for p in parameters)))

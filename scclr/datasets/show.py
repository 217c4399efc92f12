"""A sheet of pictures to look at before a run: images of the dataset and the views that pretraining will see.

Dimensions: V views of an image.
"""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scclr.augment import Augment
from scclr.datasets import ImageSet, Splits
from scclr.datasets.loader import views
from scclr.run.files import write_atomic

EXAMPLES = 8  # rows of the sheet: images of different classes, if there are as many
SHOWN_STEPS = 3  # each image is shown with its views at as many steps
PICTURE_SIDE = 96  # pixels, about
SPACE, TITLE_HEIGHT = 4, 18  # pixels


def sheet(splits: Splits, augment: Augment, *, seed: int) -> Image.Image:
    """A row for each of a few training images: the image, then its views at the first steps of ``seed``."""
    chosen = examples(splits.train)
    seen = torch.stack([views(chosen, augment, seed=seed, step=step) for step in range(SHOWN_STEPS)])
    seen = seen.unflatten(1, (-1, len(chosen))).flatten(0, 1).mul(255).round().byte()  # [steps V, EXAMPLES, C, S, S]
    columns = [("image", next(chosen.blocks(EXAMPLES)))]
    columns += [(f"view {i % len(augment.views) + 1}", pictures) for i, pictures in enumerate(seen)]
    names = [splits.classes[label] if label >= 0 else "" for label in chosen.labels.tolist()]

    font = ImageFont.load_default(size=13)
    margin = SPACE + round(max(font.getlength(name) for name in [*names, ""])) + SPACE
    cells = [[scaled(picture) for picture in pictures] for _, pictures in columns]  # [column][row]
    width, height = (max(getattr(cell, side) for column in cells for cell in column) for side in ("width", "height"))
    # The views of a step stand together.
    lefts = [margin + i * (width + SPACE) + 2 * SPACE * math.ceil(i / len(augment.views)) for i in range(len(columns))]
    size = (lefts[-1] + width + SPACE, TITLE_HEIGHT + len(chosen) * (height + SPACE))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, ((title, _), left) in enumerate(zip(columns, lefts, strict=True)):
        draw.text((left, 1), title, "black", font)
        for j, cell in enumerate(cells[i]):
            page.paste(cell, (left, TITLE_HEIGHT + j * (height + SPACE)))
    for j, name in enumerate(names):
        middle = TITLE_HEIGHT + j * (height + SPACE) + height // 2
        draw.text((SPACE, middle - TITLE_HEIGHT // 2), name, "black", font)
    return page


def examples(data: ImageSet) -> ImageSet:
    """The first image of each class, then other images, up to ``EXAMPLES`` in all."""
    labels = data.labels.tolist()
    first = [labels.index(label) for label in sorted(set(labels))[:EXAMPLES]]
    others = [i for i in range(min(len(labels), EXAMPLES)) if i not in first]
    return data[torch.tensor((first + others)[:EXAMPLES], device=data.labels.device)]


def scaled(picture: Tensor) -> Image.Image:
    """A picture uint8 [C, H, W] at about ``PICTURE_SIDE``: small pixels become squares, large images are shrunk.

    Of images with other numbers of channels than 1 and 3, the first one is drawn.
    """
    image = Image.fromarray(picture[[0, 1, 2] if len(picture) == 3 else [0] * 3].permute(1, 2, 0).cpu().numpy())
    scale = PICTURE_SIDE / max(image.size)
    if scale >= 1:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def write_sheet(page: Image.Image, directory: Path) -> Path:
    """Write ``views.png`` into a run folder; returns its path."""
    path = directory / "views.png"
    write_atomic(path, lambda file: page.save(file, format="png"))
    return path

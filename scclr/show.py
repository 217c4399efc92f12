"""A sheet of pictures to look at before a run: images of the dataset and the views that pretraining will see."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from scclr.augment import Augment
from scclr.checkpoint import write_atomic
from scclr.datasets import ImageSet, Splits
from scclr.loader import views

ROWS = 8  # images, of as many classes as there are
STEPS = 3  # how often each gets its views
CELL = 96  # pixels on the side of a picture, about
GAP, LINE = 4, 18


def sheet(splits: Splits, augment: Augment, *, seed: int) -> Image.Image:
    """Training images of different classes, a row each: the image, then its views at the first steps of ``seed``."""
    chosen = examples(splits.train)
    seen = torch.stack([views(chosen, augment, seed=seed, step=step) for step in range(STEPS)])
    seen = seen.unflatten(1, (-1, len(chosen))).flatten(0, 1).mul(255).round().byte()  # [STEPS V, ROWS, C, S, S]
    columns = [("image", next(chosen.blocks(ROWS)))]
    columns += [(f"view {i % len(augment.views) + 1}", pictures) for i, pictures in enumerate(seen)]
    names = [splits.classes[label] if label >= 0 else "" for label in chosen.labels.tolist()]

    font = ImageFont.load_default(size=13)
    margin = GAP + round(max(font.getlength(name) for name in [*names, ""])) + GAP
    cells = [[enlarged(picture) for picture in pictures] for _, pictures in columns]  # [column][row]
    wide, high = (max(getattr(cell, side) for column in cells for cell in column) for side in ("width", "height"))
    lefts = [margin + i * (wide + GAP) + 2 * GAP * math.ceil(i / len(augment.views)) for i in range(len(columns))]
    size = (lefts[-1] + wide + GAP, LINE + len(chosen) * (high + GAP))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for i, ((title, _), left) in enumerate(zip(columns, lefts, strict=True)):  # the views of a step stand together
        draw.text((left, 1), title, "black", font)
        for j, cell in enumerate(cells[i]):
            page.paste(cell, (left, LINE + j * (high + GAP)))
    for j, name in enumerate(names):
        draw.text((GAP, LINE + j * (high + GAP) + high // 2 - LINE // 2), name, "black", font)
    return page


def examples(data: ImageSet) -> ImageSet:
    """The first image of each class, of ``ROWS`` classes; filled up with others where there are fewer."""
    labels = data.labels.tolist()
    first = [labels.index(label) for label in sorted(set(labels))[:ROWS]]
    others = [i for i in range(min(len(labels), ROWS)) if i not in first]
    return data[torch.tensor((first + others)[:ROWS], device=data.labels.device)]


def enlarged(picture: Tensor) -> Image.Image:
    """A picture uint8 [C, H, W] at about ``CELL`` pixels: small pixels as squares, large images shrunk."""
    image = to_pil_image(picture.cpu()).convert("RGB")
    scale = CELL / max(image.size)
    if scale >= 1:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def write_sheet(page: Image.Image, directory: Path) -> Path:
    """``views.png`` in a run folder."""
    path = directory / "views.png"
    write_atomic(path, lambda file: page.save(file, format="png"))
    return path

"""Any tree of image files with one folder per class, decoded once."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder as Reader
from torchvision.transforms import functional

from scclr.config import require
from scclr.datasets import ImageSet, Parts, Source, reading


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """``<root>/<class>/*.jpg``, or ``<root>/train/<class>/*`` with ``<root>/test`` or ``<root>/val`` beside it.

    Every image is decoded to RGB, its shorter side resized to ``image_size`` (antialiased) and its centre cropped. In
    a tree without a test folder, ``test`` sets the share that is carved.

    Raises:
        ValueError: ``image_size`` below 1.
    """

    root: str
    image_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size}: give a number of pixels")

    def read(self) -> Parts:
        root = Path(self.root)
        require(root.is_dir(), f"{root}: no such folder; give dataset.root=<a folder with one folder per class>")
        if not (root / "train").is_dir():
            full, classes = self._decode(root)
            return Parts(full, None, classes)
        train, classes = self._decode(root / "train")
        for name in ("test", "val"):
            if (root / name).is_dir():
                test, test_classes = self._decode(root / name)
                require(test_classes == classes, f"{root / name}: its class folders are not those of {root / 'train'}")
                return Parts(train, test, classes)
        return Parts(train, None, classes)

    def _decode(self, folder: Path) -> tuple[ImageSet, list[str]]:
        with reading(folder, "give dataset.root=<a folder with one folder of images per class>"):
            reader = Reader(str(folder))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(self._open, [path for path, _ in reader.samples]))
        return ImageSet(torch.stack(images), torch.tensor(reader.targets)), reader.classes

    def _open(self, path: str) -> Tensor:
        with reading(Path(path), "replace or delete this file"), Image.open(path) as image:
            resized = functional.resize(image.convert("RGB"), [self.image_size])
            return functional.pil_to_tensor(functional.center_crop(resized, [self.image_size]))

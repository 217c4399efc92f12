"""Small image files and datasets in their published formats, which several test modules write and read."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from scclr.datasets import ImageSet
from scclr.datasets.cifar10 import CIFAR10
from scclr.datasets.digits import Digits
from scclr.datasets.imagefolder import ImageFolder

GREY = {"validation": 0.25, "mean": [0.3], "std": [0.4]}
COLOUR = {"validation": 0.25, "mean": [0.5] * 3, "std": [0.2] * 3}
PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]  # 640 x 427


def digits(**changes: object) -> Digits:
    return Digits(**{**GREY, "test": 0.25, **changes})


def image_bytes(data: ImageSet) -> set[bytes]:
    """The images of a set, to compare as a set: the digits are all different."""
    assert isinstance(data.images, torch.Tensor)
    return {image.numpy().tobytes() for image in data.images}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def write_cifar(root: Path, source: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A small CIFAR with checksums of its own, 40 training images of each class; returns them [N, 3, 32, 32]."""
    reader = source.reader
    classes = 10 if source is CIFAR10 else 100
    folder, files = root / reader.base_folder, len(reader.train_list)
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (files, 40 * classes // files, 3072), dtype=np.uint8)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, md5(folder / name)

    def batch(i: int) -> dict:
        label_key = "labels" if classes == 10 else "fine_labels"
        return {"data": pixels[i], label_key: [k % classes for k in range(len(pixels[i]))]}

    train = [write(name, batch(i)) for i, (name, _) in enumerate(reader.train_list)]
    test = [write(name, batch(0)) for name, _ in reader.test_list]
    name, digest = write(reader.meta["filename"], {reader.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(reader, "train_list", train)
    monkeypatch.setattr(reader, "test_list", test)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "filename": name, "md5": digest})
    return pixels.reshape(-1, 3, 32, 32)


def write_image(path: Path, level: int = 0, size: tuple[int, int] = (10, 12)) -> None:
    """An image of one grey level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def write_photographs(folder: Path, per_class: int = 10, size: tuple[int, int] | None = None) -> None:
    """JPEGs of two classes, of different sizes unless ``size`` is given: one is grey, one CMYK, one a PNG."""
    draw = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), PHOTOGRAPHS, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            left, top = draw.integers(0, 200, 2).tolist()
            part = photograph.crop((left, top, left + 200, top + 200))
            image = part.resize(size or (70 + 5 * (i % 16), 110 - 4 * (i % 16)))
            mode = {1: "L", 2: "CMYK"}.get(i, "RGB")
            image.convert(mode).save(folder / name / (f"{i}.png" if i == 3 else f"{i}.jpg"), quality=95)


def image_folder(root: Path, **changes: object) -> ImageFolder:
    settings = {"test": 0.25, "image_size": 24, "root": str(root), "in_memory": False, "workers": 0}
    return ImageFolder(**{**COLOUR, **settings, **changes})


def all_images(root: Path, **changes: object) -> ImageSet:
    """The images of a folder before any split, in the form that is used."""
    source = image_folder(root, **changes)
    return source.materialize(source.read().train)

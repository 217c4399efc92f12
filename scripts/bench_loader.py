"""Images per second that are read from JPEG files and cut to two random crops: torchvision's loader and scclr's.

    python scripts/bench_loader.py

The files are 500 x 375 pixels and about 110 KB, as ImageNet's, cut from the two photographs of scikit-learn. Each image
gives two random resized crops of 224 x 224 pixels, uint8, in batches of 64. torchvision has ``ImageFolder``, its
``RandomResizedCrop`` twice and a ``DataLoader``; both loaders have 1 or 2 worker processes. The start of the workers is
not counted. A core reads as much as one process, so a speed is divided by the number of workers, but no more than there
are cores. Each round measures all contenders.
Writes scripts/results/bench_loader.csv.
"""

import csv
import statistics
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder as Folder
from torchvision.transforms import transforms as T

from scclr.augment import Augment
from scclr.config.build import build
from scclr.config.compose import conf_dir
from scclr.datasets import ImageSet
from scclr.datasets.imagefolder import ImageFolder
from scclr.datasets.loader import batches
from scclr.run.machine import available_cores

IMAGES, BATCH, SIDE = 256, 64, 224
STEPS, WARM_UP = 12, 4  # batches that are timed, and before these
ROUNDS = 5
WORKERS = (1, 2)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write_images(folder: Path) -> float:
    """Write the files, of two classes; returns their mean size in KB."""
    draw = np.random.default_rng(0)
    sizes = []
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for i in range(IMAGES // 2):
            left, top = draw.integers(0, 140), draw.integers(0, 52)  # of 640 x 427 pixels
            path = folder / name / f"{i}.jpg"
            Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=98)
            sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1000


class TwoCrops:
    """Two random crops of a picture, uint8 [2, 3, S, S]."""

    def __init__(self) -> None:
        self.crop = T.Compose([T.RandomResizedCrop(SIDE, (0.08, 1.0)), T.PILToTensor()])

    def __call__(self, picture: Image.Image) -> Tensor:
        return torch.stack([self.crop(picture), self.crop(picture)])


def torchvision(folder: Path, workers: int) -> Iterable[Any]:
    endless = torch.utils.data.RandomSampler(range(IMAGES), replacement=True, num_samples=(STEPS + WARM_UP) * BATCH)
    return DataLoader(Folder(str(folder), TwoCrops()), BATCH, sampler=endless, num_workers=workers)


def scclr(folder: Path, workers: int) -> Iterable[Any]:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "augment" / "simclr.yaml"))
    assert isinstance(values, dict)
    augment: Augment = build("augment", {**values, "size": SIDE})
    options = {"validation": 0.25, "mean": MEAN, "std": STD, "image_size": SIDE, "in_memory": False}
    source = ImageFolder(root=str(folder), workers=workers, **options)  # type: ignore[arg-type]
    data: ImageSet = source.read().train
    return batches(data, augment, seed=0, batch_size=BATCH, steps=range(STEPS + WARM_UP))


def images_per_second(loader: Iterable[Any]) -> float:
    stream = iter(loader)
    for _ in islice(stream, WARM_UP):
        pass
    start = time.perf_counter()
    count = sum(1 for _ in stream)
    return count * BATCH / (time.perf_counter() - start)


def main() -> None:
    rows, cores = [], available_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_images(folder)
        contenders = {
            (label, workers): partial(make, folder, workers)
            for label, make in (("torchvision", torchvision), ("scclr", scclr))
            for workers in WORKERS
        }
        found: dict[tuple[str, int], list[float]] = {contender: [] for contender in contenders}
        for _ in range(ROUNDS):
            for contender, make in contenders.items():
                found[contender].append(images_per_second(make()))
    print(f"{IMAGES} JPEGs of {size:.0f} KB, two crops each, {cores} cores, {ROUNDS} rounds")
    for (label, workers), speeds in found.items():
        speed, theirs = statistics.median(speeds), found["torchvision", workers]
        times = statistics.median(a / b for a, b in zip(speeds, theirs, strict=True))
        rows.append({
            "contender": label, "workers": workers, "images_per_second": round(speed),
            "images_per_second_and_core": round(speed / min(workers, cores)),
            "least": round(min(speeds)), "most": round(max(speeds)), "times_torchvision": round(times, 2),
            "cores": cores, "torch": torch.__version__,
        })  # fmt: skip
        print(f"  {label:<12} {workers} workers {speed:>7,.0f} images/s {times:>6.2f} x torchvision")
    with (Path(__file__).parent / "results" / "bench_loader.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

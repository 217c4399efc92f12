"""Views per second of SimCLR's augmentation: torchvision image by image, kornia, and scclr.

    pip install scclr[bench]
    python scripts/bench_augment.py

The operations are crop, flip, jitter 0.8 (0.4, 0.4, 0.4, 0.1), grayscale 0.2, normalization, and in half of the
measurements Gaussian blur 0.5. The images are random uint8 noise of the size of the views. torchvision transforms them
one by one: PIL images (v1, v2), uint8 tensors (v2), and PIL images in a DataLoader with one worker process per core.
Each round measures all contenders.
Writes scripts/results/bench_augment.csv.
"""

import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from scclr.config.build import build
from scclr.config.compose import conf_dir
from scclr.run.machine import keep_freed_memory

ROUNDS, SECONDS = 5, 0.5  # a contender repeats within a round for at least this long
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
COUNTS = {32: 512, 224: 64}  # images of each size; each gives two views in a batch, or one in a pipeline of images

Contender = tuple[Callable[[], Any], int]  # a function that makes views, and their number


class Pictures(Dataset):
    def __init__(self, pictures: list[Any], transform: Callable[[Any], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.pictures[index])


def torchvision(module: Any, size: int, kernel: int, blur: float, head: list[Any], tail: list[Any]) -> Any:
    blurring = [module.RandomApply([module.GaussianBlur(kernel, (0.1, 2.0))], blur)] if blur else []
    return module.Compose([
        *head, module.RandomResizedCrop(size, (0.08, 1.0)), module.RandomHorizontalFlip(),
        module.RandomApply([module.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), module.RandomGrayscale(0.2),
        *blurring, *tail,
    ])  # fmt: skip


def kornia(size: int, kernel: int, blur: float) -> Any:
    import kornia.augmentation as K

    blurring = [K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur)] if blur else []
    return torch.nn.Sequential(
        K.RandomResizedCrop((size, size), (0.08, 1.0)), K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2), *blurring, K.Normalize(MEAN, STD),
    )  # fmt: skip


def contenders(size: int, blur: float) -> dict[str, Contender]:
    n, kernel = COUNTS[size], max(3, 2 * (size // 20) + 1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [to_pil_image(image) for image in images]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    old = torchvision(v1, size, kernel, blur, [], [v1.ToTensor(), v1.Normalize(MEAN, STD)])
    new = torchvision(v2, size, kernel, blur, [], to_float)
    workers = DataLoader(Pictures(pictures, old), n // 8, num_workers=os.cpu_count() or 1, persistent_workers=True)
    theirs = kornia(size, kernel, blur)
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "augment" / "simclr.yaml"))
    assert isinstance(values, dict)
    fast, exact = (build("augment", {**values, "blur": blur, "exact": value}) for value in (False, True))
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return {
        "torchvision v1, PIL": (lambda: [old(picture) for picture in pictures], n),
        "torchvision v2, PIL": (lambda: [new(picture) for picture in pictures], n),
        "torchvision v2, tensors": (lambda: [new(image) for image in images], n),
        "torchvision v1, workers": (lambda: list(workers), n),
        "kornia": (lambda: theirs(images.repeat(2, 1, 1, 1) / 255), 2 * n),
        "scclr, exact": (lambda: (exact(images, seed=0, step=0) - mean) / std, 2 * n),
        "scclr": (lambda: (fast(images, seed=0, step=0) - mean) / std, 2 * n),
    }


def main() -> None:
    keep_freed_memory()  # as scclr train does, for all contenders
    rows = []
    for size in COUNTS:
        for blur in (0.0, 0.5):
            running = contenders(size, blur)
            found: dict[str, list[float]] = {name: [] for name in running}
            for round_ in range(ROUNDS + 1):  # the first warms up
                for name, (make, views) in running.items():
                    calls, start = 0, time.perf_counter()
                    while calls == 0 or time.perf_counter() - start < SECONDS:
                        make()
                        calls += 1
                    if round_ > 0:
                        found[name].append(calls * views / (time.perf_counter() - start))
            kind = "with" if blur else "without"
            print(f"{size}x{size}, {kind} blur, {torch.get_num_threads()} threads, {ROUNDS} rounds")
            for name, speeds in found.items():
                times = {
                    f"times_{other}": statistics.median(a / b for a, b in zip(speeds, found[column], strict=True))
                    for other, column in (("torchvision", "torchvision v1, PIL"), ("kornia", "kornia"))
                }
                speed = statistics.median(speeds)
                rows.append({
                    "size": size, "blur": blur, "contender": name, "views_per_second": round(speed),
                    "least": round(min(speeds)), "most": round(max(speeds)),
                    **{key: round(value, 2) for key, value in times.items()},
                    "threads": torch.get_num_threads(), "torch": torch.__version__,
                })  # fmt: skip
                print(f"  {name:<24} {speed:>9,.0f} views/s {times['times_torchvision']:>7.2f} x torchvision v1")
    with (Path(__file__).parent / "results" / "bench_augment.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

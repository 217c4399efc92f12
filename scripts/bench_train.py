"""Pairs per second of SimCLR pretraining, end to end, beside lightly's pipeline and the bare model.

    pip install scclr[bench]
    python scripts/bench_train.py [OVERRIDE ...]      by default the two settings of the README

scclr: whole steps of the training loop (keyed order, augmentation, forward, loss, backward, optimiser, its share of
logging). lightly: its SimCLRTransform in a DataLoader with a worker process per core, its NTXentLoss, the same encoder,
projector and optimiser. The bare model, the limit: forward and backward on views that are already there. Rounds go
through all in turn; the images are random noise. Writes scripts/results/bench_train.csv.
"""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from scclr.components import make_loss, make_model, pick_device
from scclr.config.build import build
from scclr.config.compose import parse, plan
from scclr.datasets import ImageSet
from scclr.pretrain.loop import precision_dtype, pretrain
from scclr.pretrain.state import TrainState
from scclr.run.checkpoint import Checkpoints
from scclr.run.machine import keep_freed_memory
from scclr.run.preemption import CheckpointSchedule, Stop
from scclr.run.tracking import Log

ROUNDS, SECONDS = 7, 2  # a round of the bare model takes about this long
SIZES = {"digits": 8, "fashion_mnist": 28, "mnist": 28, "cifar10": 32, "cifar100": 32, "svhn": 32, "stl10": 96}
SETTINGS = {  # colour images of a size
    "convnet": (28, ["dataset=cifar10", "augment=simclr", "encoder.widths=[16,32,64]", "encoder.stem_stride=2"]),
    "ResNet-18": (32, ["dataset=cifar10", "augment=simclr", "encoder=resnet18", "pretrain.batch_size=64"]),
}


class Pictures(Dataset):
    """Two views of each image by lightly's transform."""

    def __init__(self, images: Tensor, augment: dict[str, Any]) -> None:
        from lightly.transforms import SimCLRTransform

        self.images = [to_pil_image(image) for image in images]
        names = {"cj_bright": "brightness", "cj_contrast": "contrast", "cj_sat": "saturation", "cj_hue": "hue"}
        self.transform = SimCLRTransform(
            input_size=images.shape[-1],
            cj_prob=augment["jitter"],
            cj_strength=1.0,
            **{theirs: augment[ours] for theirs, ours in names.items()},
            min_scale=augment["crop_scale"][0],
            random_gray_scale=augment["grayscale"],
            gaussian_blur=augment["blur"],
            hf_prob=augment["flip"],
            normalize=None,  # the model does
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def compare(name: str, size: int | None, overrides: list[str]) -> list[dict[str, Any]]:
    """A row for each contender: pairs per second, median and range over rounds."""
    config = plan(parse(overrides)).points[0].config
    device, options = pick_device(config.device), config.pretrain
    source, dataset = build("dataset", config.dataset), config.dataset["_target_"].split(".")[-2]
    size = size or SIZES.get(dataset) or source.image_size
    model = make_model(config, source.mean, source.std, image_size=size).to(device)
    loss, augment = make_loss(config, classes=10), build("augment", config.augment)
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=options.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    dtype = precision_dtype(device, options.precision)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    options.epochs, options.warmup, options.knn_every = 1, 0.0, 0
    model.to(memory_format=layout)
    never = CheckpointSchedule(steps=None, seconds=None, total=-1, stop=Stop())
    checkpoints = Checkpoints(Path(), never, {})
    batch = torch.randint(0, 256, (options.batch_size, len(source.mean), size, size), dtype=torch.uint8)
    views = augment(batch.to(device), seed=0, step=0).contiguous(memory_format=layout)
    direction = torch.randn(len(views), config.projector.out_dim, device=device)

    def embed(views: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(views)[1]

    def bare(steps: int) -> None:
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            (embed(views) * direction).sum().backward()

    bare(2)  # warms up
    start = time.perf_counter()
    bare(3)
    steps = max(4, round(SECONDS / ((time.perf_counter() - start) / 3)))
    if steps > options.log_every:
        steps -= steps % options.log_every  # whole rows of the log
    images = batch.repeat(steps, 1, 1, 1)
    data = ImageSet(images, torch.zeros(len(images), dtype=torch.int64)).to(device)

    def scclr(steps: int) -> None:
        state = TrainState(model, loss, optimizer, scaler)
        pretrain(
            state, data, augment, options,
            seed=0, alpha=None, checkpoints=checkpoints, log=Log(), evaluations=[],
        )  # fmt: skip

    from lightly.loss import NTXentLoss

    workers = os.cpu_count() or 1
    criterion = NTXentLoss(temperature=config.loss["temperature"])
    loader: DataLoader = DataLoader(
        Pictures(images, config.augment), options.batch_size, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip

    def lightly(steps: int) -> None:
        for first, second in loader:  # an epoch: nothing is read ahead while the others run
            optimizer.zero_grad(set_to_none=True)
            z = embed(torch.cat([first, second]).to(device, non_blocking=True).contiguous(memory_format=layout))
            criterion(*z.chunk(2)).backward()
            optimizer.step()

    def timed(body: Callable[[int], None]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        body(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * options.batch_size / (time.perf_counter() - start)

    bodies = {"bare model": bare, "scclr": scclr, "lightly": lightly}
    found: dict[str, list[float]] = {contender: [] for contender in bodies}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for contender, body in bodies.items():
            speed = timed(body)
            if round_ > 0:
                found[contender].append(speed)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: {size}x{size}, {options.batch_size} pairs a step, {steps} steps a round, {ROUNDS} rounds, {where}")
    rows = []
    for contender, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, found["bare model"], strict=True))
        row = {"setting": name, "contender": contender, "pairs_per_second": round(statistics.median(speeds), 1)}
        row |= {"least": round(min(speeds), 1), "most": round(max(speeds), 1), "of_bare": round(ratio, 3)}
        rows.append(row | {"machine": where, "torch": torch.__version__})
        print(f"  {contender:<12} {row['pairs_per_second']:>9,.1f} pairs/s   {row['of_bare']:.3f} of the bare model")
    return rows


def main() -> None:
    keep_freed_memory()  # for all of them, as scclr train does
    settings = {" ".join(sys.argv[1:]): (None, sys.argv[1:])} if sys.argv[1:] else SETTINGS
    rows = [row for name, setting in settings.items() for row in compare(name, *setting)]
    if not sys.argv[1:]:
        with (Path(__file__).parent / "results" / "bench_train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""What a training step costs beyond its encoder.

    python scripts/bench_step.py [OVERRIDE ...]      for example +experiment=fashion_mnist_cpu

Times whole steps of the training loop (keyed order, augmentation, forward, loss, backward, optimiser, and its share of
logging) against a bare forward and backward pass of the same encoder and projector on views that are already there.
Rounds alternate between the two; the ratio is the median over rounds. The images are random noise.
"""

import statistics
import sys
import time

import hydra
import torch

from scclr.config import build, conf_dir, resolve
from scclr.datasets import ImageSet
from scclr.distributed import World
from scclr.preemption import Pace, Stop
from scclr.pretrain import precision_of, pretrain
from scclr.train import make_loss, make_model, pick_device

ROUNDS, STEPS = 9, 20
SIZES = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "stl10": 96}


def main() -> None:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = resolve(hydra.compose("train", overrides=sys.argv[1:]))
    device, options = pick_device(config.device), config.pretrain
    source, dataset = build("dataset", config.dataset), config.dataset["_target_"].split(".")[-2]
    size = SIZES.get(dataset) or source.image_size
    images = torch.randint(0, 256, (STEPS * options.batch_size, len(source.mean), size, size), dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(len(images), dtype=torch.int64)).to(device)
    model = make_model(config, source.mean, source.std, image_size=size).to(device)
    loss, augment = make_loss(config, classes=10), build("augment", config.augment)
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=options.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    dtype = precision_of(device, options.precision)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    options.epochs, options.warmup_epochs, options.knn_every = 1, 0, 0
    model.to(memory_format=layout)
    views = augment(data.images[: options.batch_size], seed=0, step=0).contiguous(memory_format=layout)
    direction = torch.randn(len(views), config.projector.out_dim, device=device)

    never = Pace(steps=None, seconds=None, total=-1, stop=Stop())

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def bare() -> None:
        for _ in range(STEPS):
            model.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                _, z = model(views)
            (z * direction).sum().backward()

    def whole() -> None:
        pretrain(
            model, loss, augment, optimizer, scaler, data, options,
            seed=0, start=0, world=World(), alpha=None, pace=never,
            log=lambda step, row: None, save=lambda step, window: None, knn=lambda: 0.0,
        )  # fmt: skip

    times: dict[str, list[float]] = {"bare": [], "whole": []}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for name, body in (("bare", bare), ("whole", whole)):
            synchronise()
            start = time.perf_counter()
            body()
            synchronise()
            if round_ > 0:
                times[name].append((time.perf_counter() - start) / STEPS)
    ratios = [w / b for w, b in zip(times["whole"], times["bare"], strict=True)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{dataset} {size}x{size}, {options.batch_size} images a step, {where}")
    print(f"medians of {ROUNDS} rounds of {STEPS} steps")
    print(f"forward + backward  {1e3 * statistics.median(times['bare']):8.2f} ms")
    print(f"training step       {1e3 * statistics.median(times['whole']):8.2f} ms")
    print(f"ratio               {statistics.median(ratios):8.3f}  (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()

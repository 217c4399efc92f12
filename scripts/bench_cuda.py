"""What a GPU makes of a pretraining step and of its parts, beside other libraries and beside its own peak.

    python scripts/bench_cuda.py [--only steps,pairs,views,probe] [--batch-sizes 512] [--out FILE] [--seconds 240]
    python scripts/bench_cuda.py --device cpu --small          every part in small, in seconds

steps: pairs per second of ResNet-18 on 32 x 32 pixels, colours one by one or as one linear map, eager and compiled,
    beside the bare model (forward, backward, optimizer on views that are ready), and lightly's pipeline.
pairs: the log-sum-exp over all pairs, forward and backward, beside the dense formula and lightly.
views: augmentation, beside kornia.
probe: the evaluation of random features of ImageNet's size, 2,048 wide, with 1,000 classes.

A measurement is the median of n calls, after calls that warm up. On a GPU, events on its queue take the time. ``share``
is the arithmetic that the work needs, by the time, by the peak of a large matrix product in this run: in bfloat16 for
steps, in float32 (no TF32) for pairs. Rows are written as they come; what does not fit into --seconds is left out and
said. A library that is not installed is said, and no failure.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scclr.components import make_augment, make_loss, make_model, make_optimizer, make_protocols
from scclr.config.compose import parse, plan
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet, Splits
from scclr.datasets.loader import Batch
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features
from scclr.losses.ntxent import NTXentLoss
from scclr.pretrain.loop import precision_dtype, train_step
from scclr.pretrain.state import TrainState
from scclr.run.machine import describe, deterministic_kernels, versions

CLOCK = time.monotonic()
PAIRS = ["dataset=cifar10", "augment=simclr", "encoder=resnet18"]
SMALL = ["dataset=cifar10", "augment=simclr", "encoder=convnet", "encoder.widths=[8,16]"]
TEMPERATURE, WIDTH = 0.5, 128


class Bench:
    """The device, the rows so far, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.small, self.seconds = torch.device(options.device), options.small, options.seconds
        self.cuda, self.out, self.rows = self.device.type == "cuda", options.out, list[dict[str, Any]]()
        self.probe_images, self.batch_sizes, self.notes = options.probe_images, options.batch_sizes, list[str]()
        self.peaks: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Say something, and keep it with the rows."""
        print(text, flush=True)
        self.notes.append(text)
        self.write()

    def late(self, what: str) -> bool:
        """Whether no time is left, which is then said of ``what``."""
        late = time.monotonic() - CLOCK > self.seconds
        if late:
            self.note(f"{what}: left out, {self.seconds:g} seconds are over")
        return late

    def time(self, function: Callable[[], object], n: int = 0, warm: int = 3) -> dict[str, Any]:
        """Median, least and most seconds of ``n`` calls (few where a call is slow), and bytes beyond what was there."""
        for _ in range(warm):
            function()
        self.wait()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        found = [self._once(function)]
        if n != 1:
            n = 2 if self.small else n or max(3, min(50, int(1 / max(1e-4, found[0]))))
            found = sorted(self._once(function) for _ in range(n))
        extra = torch.cuda.max_memory_allocated() - before if self.cuda else None
        return {"n": n, "seconds": statistics.median(found), "least": found[0], "most": found[-1], "extra_bytes": extra}

    def _once(self, function: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def row(self, part: str, name: str, found: dict[str, Any], **values: Any) -> None:
        """Print and write a row."""
        self.rows.append({"part": part, "name": name, **values, **found})
        shown = "  ".join(
            f"{key} {value:.4g}" for key, value in self.rows[-1].items() if isinstance(value, int | float)
        )
        print(f"{part:<6} {name:<28} {shown}", flush=True)
        self.write()

    def write(self) -> None:
        if self.out is not None:
            machine = {**describe(self.device), "driver": driver(), "versions": versions()}
            found = {"machine": machine, "peaks": self.peaks, "rows": self.rows, "notes": self.notes}
            self.out.write_text(json.dumps(found, indent=1))

    def measure_peaks(self) -> None:
        """Operations per second of a large product in both precisions, and bytes per second of a copy."""
        side = 256 if self.small else 8192 if self.cuda else 1024
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            self.peaks[name] = 2 * side**3 / self.time(lambda a=a, b=b: a @ b)["seconds"]  # type: ignore[misc]
        source = torch.zeros(2**20 if self.small else 2**28, device=self.device)
        target = torch.empty_like(source)
        self.peaks["bytes"] = 2 * 4 * source.numel() / self.time(lambda: target.copy_(source))["seconds"]
        self.note("peaks: " + ", ".join(f"{name} {value:.3g}/s" for name, value in self.peaks.items()))


def driver() -> str | None:
    """The version of the GPU's driver."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None


def compose(*words: str) -> TrainConfig:
    """The configuration of a command line."""
    return plan(parse(words)).points[0].config


# ------------------------------------------------------------------------------------------------------------- steps


def steps(bench: Bench) -> None:
    for batch_size in (8,) if bench.small else bench.batch_sizes:
        if bench.late(f"steps at batch {batch_size}"):
            return
        try:
            steps_at(bench, batch_size)
        except torch.OutOfMemoryError:
            bench.note(f"steps at batch {batch_size}: do not fit into the memory")


def steps_at(bench: Bench, batch_size: int) -> None:
    """Rows of one batch size. The largest and the smallest are compiled too, and 512: that takes most of the time.

    What is compiled runs as ``pretrain.compile=graphs`` has it: the model's passes are CUDA graphs.
    """
    words = [*(SMALL if bench.small else PAIRS), f"pretrain.batch_size={batch_size}", "optimizer=sgd"]
    config = compose(*words)
    dtype = precision_dtype(bench.device, config.pretrain.precision)
    model = make_model(config, [0.5] * 3, [0.25] * 3, image_size=32).to(bench.device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(bench.device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(config, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    state = TrainState(model, make_loss(config, classes=10), optimizer, scaler)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=bench.device)
    batch = Batch(images, torch.zeros(batch_size, dtype=torch.int64, device=bench.device))
    exact, fast = (make_augment(compose(*words, f"augment.exact={value}")) for value in ("true", "false"))
    views = fast(images, seed=0, step=0).contiguous(memory_format=torch.channels_last)
    direction = torch.randn(len(views), config.projector.out_dim, device=bench.device)
    repeat = 1 if bench.small else 5  # steps between two events: the host may run ahead, as it does in training

    def bare(network: Any) -> None:
        for _ in range(repeat):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
                z = network(views)[1]
            (z * direction).sum().backward()
            optimizer.step()

    def step(network: Any, augment: Any) -> None:
        for _ in range(repeat):
            torch.compiler.cudagraph_mark_step_begin()
            train_step(state, network, augment, batch, seed=0, dtype=dtype, memory_format=torch.channels_last)
            state.step += 1

    with FlopCounterMode(display=False) as counted:
        bare(model)
    operations = counted.get_total_flops() / repeat

    def row(name: str, function: Callable[[], object]) -> None:
        found = bench.time(function, n=10)
        seconds = found["seconds"] / repeat
        share = operations / seconds / bench.peaks["bf16" if dtype == torch.bfloat16 else "fp32"]
        bench.row("steps", name, found, batch=batch_size, pairs_per_second=batch_size / seconds, share=share)

    row("bare, eager", lambda: bare(model))
    row("scclr, exact, eager", lambda: step(model, exact))
    row("scclr, linear, eager", lambda: step(model, fast))
    if batch_size == 512 or bench.small:
        lightly_steps(bench, state, batch_size, dtype)
    if batch_size not in (128, 512, 2048) or bench.late(f"compiled steps at batch {batch_size}"):
        return
    try:
        torch.compiler.reset()  # what was compiled before counts towards its limit of recompilations
        network = torch.compile(model, dynamic=False, mode="reduce-overhead" if bench.cuda else None)
        row("bare, compiled", lambda: bare(network))
        row("scclr, exact, compiled", lambda: step(network, exact.compiled()))
        row("scclr, linear, compiled", lambda: step(network, fast.compiled()))
    except Exception as error:
        bench.note(f"compiled steps at batch {batch_size}: {type(error).__name__}: {str(error).splitlines()[0]}")


def lightly_steps(bench: Bench, state: TrainState, batch_size: int, dtype: torch.dtype) -> None:
    """lightly's transform in worker processes, its loss, and the same model and optimizer: an epoch of some steps."""
    try:
        from bench_train import Pictures
        from lightly.loss import NTXentLoss as Theirs

        images = torch.randint(0, 256, ((2 if bench.small else 16) * batch_size, 3, 32, 32), dtype=torch.uint8)
        pictures = Pictures(images, compose(*SMALL).augment)
    except ImportError as error:
        bench.note(f"lightly's pipeline: not installed ({error})")
        return
    criterion, workers = Theirs(temperature=TEMPERATURE), 0 if bench.small else torch.multiprocessing.cpu_count()
    loader: Any = torch.utils.data.DataLoader(
        pictures, batch_size, num_workers=workers, drop_last=True, persistent_workers=workers > 0, pin_memory=bench.cuda
    )

    def epoch() -> None:
        for first, second in loader:
            state.optimizer.zero_grad(set_to_none=True)
            x = torch.cat([first, second]).to(bench.device, non_blocking=True)
            with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
                z = state.model(x.contiguous(memory_format=torch.channels_last))[1]
            criterion(*z.chunk(2)).backward()
            state.optimizer.step()

    found = bench.time(epoch, n=3, warm=1)
    bench.row("steps", "lightly", found, batch=batch_size, pairs_per_second=len(images) / found["seconds"])


# ------------------------------------------------------------------------------------------------------------- pairs


def losses(bench: Bench) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    ours = NTXentLoss(temperature=TEMPERATURE)
    yield "scclr", lambda z1, z2: ours(z1, z2).total

    def dense(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
        return logits.logsumexp(1).mean() - (z1 * z2).sum(1).mean() / TEMPERATURE

    yield "dense formula", dense
    try:
        from lightly.loss import NTXentLoss as Theirs

        yield "lightly", Theirs(temperature=TEMPERATURE)
    except ImportError as error:
        bench.note(f"lightly's loss: not installed ({error})")


def pairs(bench: Bench) -> None:
    for name, loss in losses(bench):
        for views in (64, 256) if bench.small else (1024, 4096, 16384, 65536):
            if bench.late(f"pairs of {views} views, {name}"):
                return
            z = [F.normalize(torch.randn(views // 2, WIDTH, device=bench.device), dim=1) for _ in range(2)]

            def both(z: list[Tensor] = z, loss: Callable[[Tensor, Tensor], Tensor] = loss) -> None:
                loss(*(x.detach().requires_grad_() for x in z)).backward()

            try:
                found = bench.time(both)
            except torch.OutOfMemoryError:
                bench.note(f"pairs of {views} views, {name}: do not fit into the memory")
                continue
            share = 4 * views**2 * WIDTH / found["seconds"] / bench.peaks["fp32"]  # two triangles, and two gradients
            bench.row("pairs", name, found, views=views, share=share)


# ------------------------------------------------------------------------------------------------------------- views


def views(bench: Bench) -> None:
    for side, count in ((16, 4),) if bench.small else ((32, 512), (224, 256)):
        for blur in (0.0, 0.5):
            if bench.late(f"views of {side} pixels"):
                return
            images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=bench.device)
            for name, make in augmentations(bench, side, blur):
                try:
                    found = bench.time(lambda make=make, images=images: make(images))  # type: ignore[misc]
                except Exception as error:
                    bench.note(f"views, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                    continue
                share = 2 * images.numel() * 4 / found["seconds"] / bench.peaks["bytes"]  # writing the views alone
                speed = 2 * count / found["seconds"]
                bench.row("views", name, found, side=side, blur=blur, views_per_second=speed, share=share)


def augmentations(bench: Bench, side: int, blur: float) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Each makes two views of every image. Every call of scclr is a step of its own."""
    number = iter(range(10**9))
    for exact in (True, False):
        augment = make_augment(compose(*SMALL, f"augment.blur={blur}", f"augment.exact={exact}"))
        name = "exact" if exact else "linear"
        yield f"scclr, {name}", lambda x, augment=augment: augment(x, seed=0, step=next(number))  # type: ignore[misc]
        if bench.cuda:
            fast = augment.compiled()
            yield f"scclr, {name}, compiled", lambda x, a=fast: a(x, seed=0, step=next(number))  # type: ignore[misc]
    try:
        from bench_augment import kornia

        theirs = kornia(side, max(3, 2 * (side // 20) + 1), blur).to(bench.device)
    except ImportError as error:
        bench.note(f"kornia: not installed ({error})")
        return
    yield "kornia", lambda x: theirs(x.repeat(2, 1, 1, 1) / 255)


# ------------------------------------------------------------------------------------------------------------- probe


def evaluation(bench: Bench) -> None:
    n, width, classes = (600, 16, 3) if bench.small else (bench.probe_images, 2048, 1000)
    if bench.late("probe"):
        return
    draw = torch.Generator(bench.device).manual_seed(0)
    sizes = [n, max(classes * 4, n // 20), max(classes * 4, n // 25)]
    features, sets = [], []
    for size in sizes:
        y = torch.arange(size, device=bench.device) % classes
        x = torch.randn(size, width, generator=draw, device=bench.device)
        rows = torch.arange(size, device=bench.device)
        x[rows, y % width] += 2
        features.append((x, y))
        sets.append(ImageSet(torch.empty(size, 0), y))  # no pixels
    splits = Splits(sets[0], *sets, tuple(map(str, range(classes))), (0.5,), (0.25,))
    protocols = make_protocols(compose("probe.protocols.logreg.l2=[0.001,0.01,0.1]"))
    found = bench.time(lambda: probe(Features(*features, splits), protocols), n=1, warm=0)
    own = sum(x.numel() * 4 for x, _ in features)
    times = None if found["extra_bytes"] is None else found["extra_bytes"] / own
    bench.row("probe", "scclr", found, images=n, width=width, classes=classes, extra_of_features=times)


PARTS = {"steps": steps, "pairs": pairs, "views": views, "probe": evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="small sizes: whether it works, not how fast")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 128, 2048, 256, 1024], help="of the steps")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--probe-images", type=int, default=1_281_167)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: type --device cpu --small for a trial")
    if unknown := set(options.only.split(",")) - set(PARTS):
        sys.exit(f"--only {min(unknown)}: choose from {', '.join(PARTS)}")
    bench = Bench(options)
    with deterministic_kernels(False):  # as pretraining on a GPU: cuDNN tries its algorithms
        bench.measure_peaks()
        for part in options.only.split(","):
            PARTS[part](bench)
    bench.write()


if __name__ == "__main__":
    main()

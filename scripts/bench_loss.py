"""Time and memory of NT-Xent, forward and backward, against other libraries. Linux.

    pip install scclr[bench]
    python scripts/bench_loss.py [VIEWS ...]      by default 512 2048 8192 16384 65536

Every measurement runs in its own process, and each round measures all contenders. Time is the median over rounds;
memory is the largest growth of the resident set beyond the inputs. A contender is skipped at a size that would not fit
the available memory if its need grows with the square of the number of views.
Writes scripts/results/bench_loss.csv and .png.
"""

import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS, WIDTH, TEMPERATURE = (512, 2048, 8192, 16384, 65536), 128, 0.5
ROUNDS, SECONDS = 3, 0.5  # small sizes repeat within a process for this long
RESULTS = Path(__file__).parent / "results"

Function = Callable[[Tensor, Tensor], Tensor]


def scclr() -> Function:
    from scclr.losses.ntxent import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z1, z2: loss(z1, z2).total


def dense() -> Function:
    """The formula with all similarities in memory, by automatic differentiation."""

    def total(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
        return logits.logsumexp(1).mean() - (z1 * z2).sum(1).mean() / TEMPERATURE

    return total


def lightly() -> Function:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def pytorch_metric_learning() -> Function:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2))


def solo_learn() -> Function:
    """The formula of solo-learn: exponentials of all similarities, and masks of the same size."""

    def total(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        similarities = torch.exp(z @ z.T / TEMPERATURE)
        image = torch.arange(len(z1)).repeat(2)
        positives = (image.unsqueeze(0) == image.unsqueeze(1)).float().fill_diagonal_(0)
        negatives = (image.unsqueeze(0) != image.unsqueeze(1)).float()
        positive, negative = (similarities * positives).sum(1), (similarities * negatives).sum(1)
        return -torch.log(positive / (positive + negative)).mean()

    return total


CONTENDERS: dict[str, Callable[[], Function]] = {
    "scclr": scclr,
    "dense formula": dense,
    "lightly": lightly,
    "pytorch-metric-learning": pytorch_metric_learning,
    "solo-learn's formula": solo_learn,
}


def measure(name: str, views: int) -> dict[str, Any]:
    """Seconds and MiB beyond the inputs of one forward and backward pass in this process, and the loss."""
    function = CONTENDERS[name]()
    torch.manual_seed(0)
    small, large = (
        [F.normalize(torch.randn(n // 2, WIDTH), dim=1).requires_grad_() for _ in range(2)] for n in (64, views)
    )
    function(*small).backward()  # loads what a first call needs, which does not depend on the size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        for z in large:
            z.grad = None
        start = time.perf_counter()
        loss = function(*large)
        loss.backward()
        times.append(time.perf_counter() - start)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": statistics.median(times), "extra_mib": extra, "loss": float(loss.detach())}


def available_mib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return float(fields["MemAvailable"].split()[0]) / 1024


def compare(sizes: list[int]) -> list[dict[str, Any]]:
    """One row per contender and size, each measured in its own processes."""
    rows: list[dict[str, Any]] = []
    largest: dict[str, dict[str, Any]] = {}  # the last row of each contender, which predicts the memory it needs
    for views in sizes:
        running = []
        for name in CONTENDERS:
            last = largest.get(name)
            need = 0.0 if last is None else last["extra_mib"] * (views / last["views"]) ** 2
            if need > 0.8 * available_mib():
                print(f"{name:<24} {views:>6}  skipped: about {need / 1024:.0f} GiB would not fit")
            else:
                running.append(name)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(ROUNDS):
            for name in running:
                command = [sys.executable, __file__, "--one", name, str(views)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
        for name, found in rounds.items():
            row = {"contender": name, "views": views}
            row |= {key: statistics.median(one[key] for one in found) for key in found[0]}
            largest[name] = row
            rows.append(row)
            print(
                f"{name:<24} {views:>6} {1e3 * row['seconds']:>12.1f} ms {row['extra_mib']:>9.1f} MiB {row['loss']:.7f}"
            )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "extra_mib"), ("seconds", "MiB beyond the inputs"), strict=True):
        for name in CONTENDERS:
            points = [(row["views"], row[key]) for row in rows if row["contender"] == name]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel="views", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"NT-Xent, forward + backward, {WIDTH} dimensions, {torch.get_num_threads()} CPU threads")
    figure.savefig(path, dpi=150)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    sizes = [int(views) for views in sys.argv[1:]] or list(VIEWS)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {ROUNDS} rounds")
    rows = compare(sizes)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "bench_loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "bench_loss.png")


if __name__ == "__main__":
    main()

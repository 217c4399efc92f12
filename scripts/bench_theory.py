"""Time and memory of the theory, without the encoder: bias, collapse, objective, bounds, correlations. Linux only.

    python scripts/bench_theory.py [IMAGES VIEWS DIMENSIONS]      default: 10000 4 128

Embeddings of ten random classes stand in for z and h. Memory is the largest growth of the resident set beyond them.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from scclr import theory

TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0)  # conf/train.yaml


def resident() -> float:
    """The largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    n, m, d = map(int, sys.argv[1:4] or (10_000, 4, 128))
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (n,), generator=random)
    centres, images, views = (torch.randn(*shape, d, generator=random) for shape in ((10, 1), (n, 1), (n, m)))
    z = F.normalize(centres[labels] + images + views / 2, dim=2)
    theory.prototype_bias(z[:100], labels[:100])  # what the first call loads does not depend on the size
    before = resident()
    pieces: dict[str, Callable[[], Any]] = {
        "prototype_bias, z": lambda: theory.prototype_bias(z, labels),
        "prototype_bias, h": lambda: theory.prototype_bias(z, labels),
        "collapse, z and h": lambda: [theory.collapse(z, labels) for _ in "zh"],
        "supervised_objective": lambda: theory.supervised_objective(z, labels, 1.0),
        f"bound, {len(TEMPERATURES)} temperatures": lambda: theory.bound(z, labels, TEMPERATURES, 1.0),
        "augmentation_correlations": lambda: theory.augmentation_correlations(z),
    }
    print(f"{n:,} images x {m} views x {d} dimensions, {torch.get_num_threads()} threads, torch {torch.__version__}")
    total = 0.0
    for name, piece in pieces.items():
        start = time.perf_counter()
        piece()
        total += (seconds := time.perf_counter() - start)
        print(f"  {name:<28} {seconds:8.2f} s")
    print(f"  {'all':<28} {total:8.2f} s, {resident() - before:,.0f} MiB beyond the embeddings")


if __name__ == "__main__":
    main()

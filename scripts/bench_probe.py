"""Time and objective of the probe's logistic regression over a path of L2 strengths, beside scikit-learn's. Linux.

    python scripts/bench_probe.py [ROUNDS]      by default 3; Fashion-MNIST's pixels are measured in one of them
    python scripts/bench_probe.py --memory      the whole probe on 200,000 x 2,048 random features, and its memory
    python scripts/bench_probe.py --knn         kNN of 10,000 queries among 60,000 x 128, beside scikit-learn's
    python scripts/bench_probe.py --protocols   every protocol that trains nothing, on 60,000 x 256, split as a dataset

Every measurement runs in its own process on 2 threads, and each round measures all contenders. All follow the path from
the strongest penalty on, and each fit starts from the one before. scclr is given features in float32 as they are, and
standardizes them; scikit-learn is given standardized features in float64, and the time to make them is not counted.
scikit-learn's ``tol`` is the loosest power of ten with which its L-BFGS comes within 1e-6 on the first problem. On
Fashion-MNIST's pixels both may do ``PIXEL_LIMIT`` iterations at each strength, twice what the protocol does, since
neither converges at the weakest penalties in ten minutes; newton-cholesky's Hessian of 7,850 x 7,850 takes minutes for
each iteration there.

``seconds`` is the median over rounds. ``excess`` is the largest over strengths of objective / the least of any
contender - 1, ``gradient`` the largest entry of the objective's gradient, and ``accuracy`` that on the training images
at the weakest penalty. Writes scripts/results/bench_probe.csv.
"""

import csv
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scclr.components import make_protocols
from scclr.config.compose import parse, plan
from scclr.datasets import ImageSet, Splits
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.logreg import Objective, accuracy, fit_logreg, predict
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features
from scclr.run.machine import keep_freed_memory

STRENGTHS, CLASSES, ROUNDS, THREADS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), 10, 3, 2
LIMIT, PIXEL_LIMIT = 5000, 100  # iterations of a fit; no contender reaches the first
RESULTS = Path(__file__).parent / "results"
CONTENDERS = {
    "20,000 x 128, overlapping clusters": ("scclr", "lbfgs", "newton-cholesky"),
    "60,000 x 784, Fashion-MNIST's pixels": ("scclr", "lbfgs"),
}


def data(problem: str) -> tuple[Tensor, Tensor]:
    """Features in float32 and labels."""
    if "pixels" in problem:
        from scclr.datasets.fashion_mnist import FashionMNIST
        from scclr.evaluate.features import pixels

        splits = FashionMNIST(root=None, mean=[0.2860], std=[0.3530], validation=0.1).load()
        parts = (splits.train, splits.validation)
        return torch.cat([pixels(part) for part in parts]), torch.cat([part.labels for part in parts])
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, CLASSES, (20_000,), generator=draw)
    x = 0.35 * torch.randn(CLASSES, 128, generator=draw)[y] + torch.randn(20_000, 128, generator=draw)
    return x @ torch.randn(128, 128, generator=draw) / 128**0.5, y


def measure(problem: str, name: str, limit: int) -> dict[str, Any]:
    """The seconds of the path in this process, and what it reached at each strength."""
    torch.set_num_threads(THREADS)
    x, y = data(problem)
    found: list[Tensor] = []  # weights on the features as they are
    iterations: list[int] = []
    if name == "scclr":
        fit_logreg([(x[:100], y[:100])], CLASSES, 1.0, 2)  # loads what a first call needs
        start = time.perf_counter()
        for l2 in STRENGTHS:
            fit = fit_logreg([(x, y)], CLASSES, l2, limit, found[-1] if found else None)
            found.append(fit.weights)
            iterations.append(fit.iterations)
        seconds = time.perf_counter() - start
    else:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        warnings.simplefilter("ignore")  # the limit of iterations
        to_raw = Objective.of([(x, y)], 1.0).standard
        standard, labels = (x.double() @ to_raw[:-1, :-1] + to_raw[:-1, -1]).numpy(), y.numpy()
        model = LogisticRegression(solver=name, tol=1e-7 if name == "lbfgs" else 1e-4, warm_start=True)
        with threadpool_limits(THREADS):
            start = time.perf_counter()
            for l2 in STRENGTHS:
                model.set_params(C=1 / (l2 * len(x)), max_iter=limit).fit(standard, labels)
                bias = torch.from_numpy(model.intercept_).double().unsqueeze(1)
                found.append(torch.cat([torch.from_numpy(model.coef_).double(), bias], 1) @ to_raw)
                iterations.append(int(max(model.n_iter_)))
            seconds = time.perf_counter() - start
    values, gradients = [], []
    for l2, weights in zip(STRENGTHS, found, strict=True):
        objective = Objective.of([(x, y)], l2)
        value, gradient = objective(weights)
        values.append(value.item())
        gradients.append((gradient @ objective.standard.T).abs().max().item())
    right = accuracy(predict(x, found[-1]), y)
    return {
        "seconds": seconds, "values": values, "gradient": max(gradients), "iterations": iterations, "accuracy": right
    }  # fmt: skip


def compare(problem: str, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS[problem]}
    for _ in range(rounds):
        for name, done in runs.items():
            limit = PIXEL_LIMIT if "pixels" in problem else LIMIT
            command = [sys.executable, "-P", __file__, "--one", problem, name, str(limit)]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            done.append(json.loads(finished.stdout.splitlines()[-1]))
    least = [min(values) for values in zip(*(done[0]["values"] for done in runs.values()), strict=True)]
    rows = []
    for name, done in runs.items():
        row = {
            "problem": problem,
            "contender": name if name == "scclr" else f"scikit-learn {name}",
            "rounds": rounds,
            "seconds": round(statistics.median(one["seconds"] for one in done), 2),
            "iterations": sum(done[0]["iterations"]),
            "excess": f"{max(v / w - 1 for v, w in zip(done[0]['values'], least, strict=True)):.1e}",
            "gradient": f"{done[0]['gradient']:.1e}",
            "accuracy": round(done[0]["accuracy"], 5),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def as_features(parts: list[tuple[Tensor, Tensor]]) -> Features:
    """Features of images without pixels."""
    sets = [ImageSet(torch.empty(len(y), 1, 1, 1, dtype=torch.uint8), y) for _, y in parts]
    return Features(*parts, Splits(sets[0], *sets, tuple("0123456789"), (0.5,), (0.5,)))


def chosen(*options: str, names: str = "logreg,knn") -> dict[str, Any]:
    """The protocols with these options, as a run has them."""
    words = [f"probe.protocols=[{names}]", *(f"probe.protocols.{option}" for option in options)]
    return make_protocols(plan(parse(words)).points[0].config)


def around(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, which overlap in part."""
    draw = torch.Generator().manual_seed(seed)
    centres = 0.3 * torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, CLASSES, (n,), generator=draw)
    return centres[y] + torch.randn(n, width, generator=draw), y


def neighbours(rounds: int) -> None:
    """Print the seconds of kNN and of scikit-learn's two brute forces; medians of ``rounds``."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as in a run
    bank, (x, _) = around(60_000, 128, 1), around(10_000, 128, 2)
    unit, queries = (torch.nn.functional.normalize(rows, dim=1).numpy() for rows in (bank[0], x))
    seconds: dict[str, list[float]] = {}
    for k in (20, 200):
        for _ in range(rounds):
            start = time.perf_counter()
            ours = knn_predict([bank], x, CLASSES, k=k, temperature=0.1)
            seconds.setdefault(f"k = {k}  scclr", []).append(time.perf_counter() - start)
            for metric, scale in (("cosine", 0.1), ("euclidean", 0.2)):  # |a - b|^2 = 2 - 2 cosine

                def weights(d: np.ndarray, squared: int = 1 + (metric == "euclidean"), by: float = scale) -> np.ndarray:
                    return np.exp((d.min(1, keepdims=True) ** squared - d**squared) / by)

                with threadpool_limits(THREADS):
                    start = time.perf_counter()
                    model = KNeighborsClassifier(k, metric=metric, algorithm="brute", weights=weights)
                    theirs = model.fit(unit, bank[1].numpy()).predict(queries)
                    seconds.setdefault(f"k = {k}  scikit-learn, {metric}", []).append(time.perf_counter() - start)
                assert (ours.numpy() == theirs).mean() > 0.999
    for name, values in seconds.items():
        print(f"{name:<32} {statistics.median(values):6.2f} s")


def protocols() -> None:
    """Print the seconds of each protocol on 54,000, 6,000 and 10,000 features of width 256."""
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    features = as_features([around(n, 256, seed) for seed, n in enumerate((54_000, 6_000, 10_000))])
    for name, protocol in chosen(names="logreg,knn,knn200,ncc,lowshot,clusters").items():
        start = time.perf_counter()
        outcome = protocol(features)
        first = next(iter(outcome.metrics.items()))
        print(f"{name:<10} {time.perf_counter() - start:6.1f} s  {first[0]} {first[1]:.4f}", flush=True)


def peak() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> None:
    """Print the peak memory of the probe beside the size of its features, and what it was before."""
    torch.set_num_threads(THREADS)
    counts, width = (180_000, 10_000, 10_000), 2048
    parts = [(torch.randn(n, width), torch.randint(0, CLASSES, (n,))) for n in counts]
    features, protocols = as_features(parts), chosen("logreg.l2=[1e-3,1e-2]", "logreg.max_iter=10")
    before, size = peak(), sum(x.numel() * x.element_size() for x, _ in parts)
    start = time.perf_counter()
    probe(features, protocols)
    print(
        f"features {size / 1e9:.2f} GB; peak {peak() / 1e9:.2f} GB, of which {before / 1e9:.2f} GB were there before; "
        f"added {(peak() - before) / size:.3f} of the features; {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    if sys.argv[1:] == ["--memory"]:
        memory()
        return
    if sys.argv[1:] == ["--knn"]:
        neighbours(ROUNDS)
        return
    if sys.argv[1:] == ["--protocols"]:
        protocols()
        return
    if sys.argv[1:2] == ["--one"]:
        problem, name, limit = sys.argv[2:]
        print(json.dumps(measure(problem, name, int(limit))))
        return
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    print(f"torch {torch.__version__}, {THREADS} threads")
    rows: list[dict[str, Any]] = []
    for problem in CONTENDERS:
        rows += compare(problem, 1 if "pixels" in problem else rounds)
        with (RESULTS / "bench_probe.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

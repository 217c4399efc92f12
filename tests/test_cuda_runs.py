"""Whole runs on one GPU and on two: repeatable, resumable, stopped by signals, and evaluated in little memory.

pytest -m cuda -n 4 --dist load         on one GPU
pytest -m cuda2 -n 4 --dist load        on two
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from conftest import compose, result_of, rows_of
from cuda_helpers import (
    CUDA,
    DEVICE,
    GPUS,
    MARKS,
    WORDS,
    alone,
    card,
    coloured,
    environment,
    parts,
    peak_bytes,
    run_of,
    saved,
    scclr,
    sized,
)
from image_files import write_image, write_photographs
from processes import children, ended, until
from torch import Tensor

from scclr.components import make_protocols
from scclr.datasets import ImageSet, Splits
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features
from scclr.run.checkpoint import load
from scclr.theory.forecast import forecast_collapse

pytestmark = MARKS
__all__ = ["alone", "card"]

two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"two GPUs are needed, and there are {GPUS}")
TWO = [pytest.mark.cuda2, two_gpus]
LONG = ["stages=[pretrain]", "pretrain.epochs=4000", "checkpoint.every=5"]  # ends only by a signal
# A command that runs in a part of the GPU's memory. On the CPU, the first step says what PyTorch says when it is full.
LITTLE_MEMORY = """
import sys, torch
from scclr.cli import dispatch
import scclr.pretrain.loop as loop

def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(700 * 2**20 / total)
else:
    loop.train_step = full
sys.exit(dispatch(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    processes.kill_started()


def begin(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """``scclr train`` in the background."""
    line = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "scclr", "train", *words]
    return processes.start(line, folder, **environment())


def wait_for_a_checkpoint(process: subprocess.Popen, runs: Path, after: int = 0) -> None:
    """Until the one run below ``runs`` has a checkpoint of a later step than ``after``."""
    until(lambda: process.poll() is not None or (saved(runs) and load(run_of(runs))["step"] > after), seconds=120)
    assert process.poll() is None, process.communicate()[1]


def weights(run: Path) -> dict[str, Tensor]:
    return load(run)["model"]


def same_bits(one: Path, other: Path) -> None:
    """Two runs logged the same numbers, and their weights have the same bits."""
    assert rows_of(one) == rows_of(other)
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


# ----------------------------------------------------------------------------------------------------------- one GPU


@pytest.mark.parametrize("extra", [[], ["pretrain.precision=bf16", "augment.exact=true", "pretrain.micro_batch=48"]])
def test_deterministic_runs_repeat_and_resume_bit_by_bit(tmp_path: Path, extra: list[str]) -> None:
    words = [*WORDS, "encoder=resnet18", "deterministic=true", "pretrain.epochs=20", "checkpoint.every=10", *extra]
    words = [word for word in words if not word.startswith(("encoder.widths", "encoder=convnet"))]
    if not CUDA:
        words = [*WORDS, "deterministic=true", "pretrain.epochs=20", "checkpoint.every=10", *extra]
    for runs in ("one", "two"):
        scclr(tmp_path, *words, f"runs={runs}")
    same_bits(run_of(tmp_path / "one"), run_of(tmp_path / "two"))
    assert result_of(run_of(tmp_path / "one"))["metrics"] == result_of(run_of(tmp_path / "two"))["metrics"]
    process = begin(tmp_path, *words, "runs=killed")
    wait_for_a_checkpoint(process, tmp_path / "killed")
    process.kill()
    process.wait()
    assert not (run_of(tmp_path / "killed") / "result.json").exists(), "it was killed before its end"
    scclr(tmp_path, *words, "runs=killed")
    same_bits(run_of(tmp_path / "one"), run_of(tmp_path / "killed"))


def test_too_little_memory_is_one_line_and_the_run_can_go_on(tmp_path: Path) -> None:
    words = [*WORDS, "pretrain.epochs=2"]
    words += sized(["encoder=resnet18", "augment.size=32", "pretrain.batch_size=200"], [])  # a step takes 1 GiB
    words = [word for word in words if not (CUDA and word.startswith(("encoder.widths", "encoder=convnet")))]
    line = [sys.executable, "-c", LITTLE_MEMORY, "train", *words]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, done.stderr
    assert "pretrain.micro_batch=" in errors[0]
    assert "Traceback" not in done.stderr
    scclr(tmp_path, *words)
    assert result_of(run_of(tmp_path / "runs"))["metrics"]


def classes_of_features(n: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [n, width] of ten classes, which a linear classifier tells apart in part, and the classes."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(10, (n,), generator=draw)
    centres = torch.randn(10, width, generator=draw).to(device)
    noise = torch.randn(n, width, generator=torch.Generator(device).manual_seed(1), device=device)
    return 1.6 / width**0.5 * centres[y.to(device)] + noise, y.to(device)


def features_as_splits(n: int, width: int, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], Splits]:
    """Features and labels of a training, a validation and a test split, and these splits without images."""
    x, y = classes_of_features(n, width, device)
    ends = (round(0.8 * n), round(0.9 * n))
    cut = [slice(0, ends[0]), slice(*ends), slice(ends[1], n)]
    train, validation, test = (ImageSet(torch.empty(len(y[part]), 0), y[part]) for part in cut)  # no pixels
    names = tuple(str(c) for c in range(10))
    splits = Splits(train, train, validation, test, names, (0.5,), (0.25,))
    return [(x[part].clone(), y[part]) for part in cut], splits


def test_the_probe_takes_little_memory_beside_the_features() -> None:
    protocols = make_protocols(compose("probe.protocols.logreg.l2=[0.001,0.1,10]"))
    small, few = features_as_splits(1000, 32, DEVICE)
    probe(Features(*small, few), protocols)  # loads what a first call needs
    n, width = sized((200_000, 2048), (1000, 32))
    features, splits = features_as_splits(n, width, DEVICE)
    taken = peak_bytes(lambda: probe(Features(*features, splits), protocols))
    assert taken <= 1.5 * 4 * n * width, f"{taken / (4 * n * width):.2f} times the features, besides themselves"


def test_the_probe_chooses_and_scores_as_on_the_cpu() -> None:
    n, width = sized((20_000, 256), (2000, 32))
    features, splits = features_as_splits(n, width, DEVICE)
    words = ["probe.protocols=[logreg,knn,ncc,lowshot,clusters]", "probe.protocols.logreg.l2=[0.001,0.1,10]"]
    protocols, cpu = make_protocols(compose(*words, "probe.protocols.lowshot.draws=2")), torch.device("cpu")
    there = probe(Features(*features, splits), protocols)
    here = probe(Features(*((x.cpu(), y.cpu()) for x, y in features), splits.to(cpu)), protocols)
    for name, outcome in here.items():
        assert there[name].metrics == pytest.approx(outcome.metrics, abs=0.005), name
        if outcome.validation is not None:
            assert there[name].validation == pytest.approx(outcome.validation, abs=0.002)
    assert there["logreg-v1"].chosen["l2"] == here["logreg-v1"].chosen["l2"]
    assert 0.2 < here["logreg-v1"].metrics["top1"] < 1, "the classes are told apart in part"


def test_neighbours_are_those_of_the_cpu() -> None:
    x, y = classes_of_features(sized(20_000, 2000), sized(512, 64), DEVICE)
    votes = partial(knn_predict, classes=10, k=20, temperature=0.07)
    there = votes([(x[500:], y[500:])], x[:500])
    here = votes([(x[500:].cpu(), y[500:].cpu())], x[:500].cpu())
    assert (there.cpu() == here).double().mean() >= 0.998


def test_the_forecast_takes_little_memory() -> None:
    words = sized(["encoder=resnet50"], ["encoder=convnet", "encoder.widths=[8,16]"])
    _, state, augment = parts(*words)
    n, side = sized((4096, 224), (64, 32))
    data, form = coloured(n, side), state.loss.logsumexp_form()
    assert form is not None
    taken = peak_bytes(lambda: forecast_collapse(state.model, data, augment, form, batch=n, seed=0))
    assert taken <= 8 * 2**30, f"{taken / 2**30:.1f} GiB"


def test_image_files_are_read_ahead_and_a_signal_to_all_is_obeyed(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photographs", per_class=40)
    words = [
        "dataset=imagefolder", "dataset.root=photographs", "dataset.image_size=32", "dataset.in_memory=false",
        "dataset.workers=4", "augment=simclr", "encoder.widths=[8,16]", "pretrain.batch_size=16",
        "pretrain.knn_every=0", "pretrain.compile=false", f"device={DEVICE.type}",
    ]  # fmt: skip
    long, short = (["stages=[pretrain]", "checkpoint.every=5", f"pretrain.epochs={n}"] for n in (4000, 3))
    process = begin(tmp_path, *words, *long)
    wait_for_a_checkpoint(process, tmp_path / "runs")
    workers = children(process.pid, "scclr")
    before = load(run_of(tmp_path / "runs"))["step"]
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert load(run_of(tmp_path / "runs"))["step"] > before, "it saved before it left"
    until(lambda: all(ended(number) for number in workers))
    scclr(tmp_path, *words, *short, "runs=short")
    assert load(run_of(tmp_path / "short"))["step"] == 3 * (2 * 40 * 8 // 10 * 9 // 10 // 16)


def test_a_checkpoint_of_the_cpu_is_evaluated_alike(tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("device=") and word != "dataset.limit=300"]
    scclr(tmp_path, *words, "pretrain.epochs=3", "device=cpu")
    run = run_of(tmp_path / "runs")
    scclr(tmp_path, "stages=[probe]", f"init_from={run}", f"device={DEVICE.type}", "runs=again")
    here, there = result_of(run)["metrics"], result_of(run_of(tmp_path / "again"))["metrics"]
    knn = [name for name in here if "knn-v1/" in name]
    assert len(knn) >= 3
    for name in knn:
        assert there[name] == pytest.approx(here[name], abs=0.002), name


def test_one_process_of_torchrun_is_a_run(tmp_path: Path) -> None:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=1")
    scclr(tmp_path, *WORDS, "pretrain.epochs=2", launcher=torchrun)
    assert result_of(run_of(tmp_path / "runs"))["machine"]["device"] == DEVICE.type


# A group of one process, in which collectives and batch normalization go through NCCL.
GROUP = """
import copy, sys, torch, torch.distributed as dist
from scclr.run import distributed
device = torch.device(sys.argv[1])
dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                        init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
distributed.world_size = lambda: Size(1)
class Size(int):
    def __eq__(self, other): return False  # one process takes the way of several
    def __gt__(self, other): return True
    __hash__ = int.__hash__
x = torch.randn(6, 4, device=device, requires_grad=True)
y = distributed.gather(x)
y.square().sum().backward()
assert torch.equal(y, x) and torch.allclose(x.grad, 2 * x)
assert distributed.all_reduce_max(3) == 3
distributed.barrier()
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 3)).to(device)
    images = torch.randn(16, 3, 12, 12, device=device).contiguous(memory_format=torch.channels_last)
    found = []
    for network in (copy.deepcopy(model), distributed.replicate(model)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = network(images).float()
        (out.square().mean() + out[0, 0].sum()).backward()
        found.append([out.detach()] + [p.grad for p in network.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * b.norm() + 1e-5, (dtype, a, b)
dist.destroy_process_group()
print("alike")
"""


def test_a_group_of_one_computes_what_one_process_does(tmp_path: Path) -> None:
    device = f"{DEVICE.type}:0" if CUDA else "cpu"
    line = [sys.executable, "-c", GROUP, device, str(tmp_path / "store")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("alike\n"), done.stderr


# ---------------------------------------------------------------------------------------------------------- two GPUs


class TestTwo:
    """Two processes, each with a GPU of its own."""

    pytestmark = TWO

    def test_they_are_one(self, tmp_path: Path) -> None:
        words = [*WORDS, "pretrain.epochs=3", "pretrain.precision=fp32", "deterministic=true"]
        for n in (1, 2):
            scclr(tmp_path, *words, f"nproc={n}", f"runs={n}")
        one, two = (run_of(tmp_path / str(n)) for n in (1, 2))
        for row, wanted in zip(rows_of(two), rows_of(one), strict=True):
            assert row == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(two)[name], value, rtol=2e-3, atol=1e-3, msg=name)
        metrics = (result_of(run)["metrics"] for run in (one, two))
        assert next(metrics) == pytest.approx(next(metrics), abs=0.02)

    @pytest.mark.parametrize("extra", [["pretrain.precision=bf16"], ["pretrain.micro_batch=16"]])
    def test_they_train_in_bfloat16_and_in_parts(self, tmp_path: Path, extra: list[str]) -> None:
        scclr(tmp_path, *WORDS, "pretrain.epochs=3", *extra, "nproc=2")
        rows = rows_of(run_of(tmp_path / "runs"))
        assert rows[-1]["pretrain/loss"] < rows[0]["pretrain/loss"]

    def test_a_killed_process_ends_all(self, tmp_path: Path) -> None:
        process = begin(tmp_path, *WORDS, *LONG, "nproc=2")
        wait_for_a_checkpoint(process, tmp_path / "runs")
        ranks = children(process.pid, "spawn_main")
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        _, err = process.communicate(timeout=90)
        assert time.monotonic() - start < 60
        assert process.returncode == 1, err
        assert "SIGKILL" in err
        assert all(ended(number) for number in ranks)

    def test_an_interrupt_saves(self, tmp_path: Path) -> None:
        process = begin(tmp_path, *WORDS, *LONG, "nproc=2")
        wait_for_a_checkpoint(process, tmp_path / "runs")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert load(run_of(tmp_path / "runs"))["step"] > 0

    def test_a_run_goes_on_in_another_number_of_processes(self, tmp_path: Path) -> None:
        steps = []
        for n in (2, 1, 2):
            process = begin(tmp_path, *WORDS, *LONG, f"nproc={n}")
            wait_for_a_checkpoint(process, tmp_path / "runs", after=steps[-1] if steps else 0)
            os.killpg(process.pid, signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 75, err
            steps.append(load(run_of(tmp_path / "runs"))["step"])
        assert steps == sorted(set(steps)), "each went on where the last one had stopped"

    @pytest.mark.usefixtures("alone")
    @pytest.mark.skipif(not CUDA, reason="the processes share the cores of the CPU")
    def test_they_are_nearly_twice_as_fast(self, tmp_path: Path) -> None:
        for i in range(2400):
            write_image(tmp_path / "grey" / str(i % 2) / f"{i}.png", i % 256, (32, 32))
        words = [
            "dataset=imagefolder", "dataset.root=grey", "dataset.image_size=32", "augment=simclr", "encoder=resnet18",
            "stages=[pretrain]", "pretrain.log_every=30", "pretrain.knn_every=0", "pretrain.compile=false",
            "device=cuda",
        ]  # fmt: skip
        speeds = []
        for n in (1, 2):
            size = [f"pretrain.batch_size={512 * n}", f"pretrain.epochs={100 * n}", f"nproc={n}", f"runs={n}"]
            scclr(tmp_path, *words, *size)
            rows = (run_of(tmp_path / str(n)) / "metrics.jsonl").read_text().splitlines()
            speeds.append(max(json.loads(row)["pretrain/images_per_second"] for row in rows[1:]))
        assert speeds[1] >= 1.85 * speeds[0], speeds

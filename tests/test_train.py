"""Whole runs: what they write, that they resume, skip, sweep and can be evaluated again."""

import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, compose, result_of, rows_of, run_folders

from scclr.config.build import build
from scclr.config.compose import conf_dir
from scclr.config.errors import UserError
from scclr.datasets.loader import batch_indices
from scclr.run import machine
from scclr.run.checkpoint import load
from scclr.run.lock import run_lock

Run = Callable[..., int]
METRICS = {
    prefix + name
    for prefix in ("", "baseline/untrained/", "baseline/pixels/")
    for protocol in ("logreg-v1", "knn-v1")
    for name in (f"{protocol}/{metric}" for metric in ("top1", "top5", "balanced", "ece"))
}


def test_a_run_leaves_its_record(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", *TINY) == 0
    (run,) = run_folders(folder)
    result = result_of(run)
    quality = {f"quality/{layer}/{name}" for layer in "hz" for name in ("rankme", "lidar")}
    assert set(result["metrics"]) == METRICS | quality
    assert all(0 <= result["metrics"][name] <= 1 for name in METRICS)
    assert result["metrics"]["logreg-v1/top1"] > 0.5
    assert {"python", "torch", "git"} <= set(result["versions"])
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    last = {key.removeprefix("pretrain/") for key in rows[-1]}
    assert {"loss", "attract", "repel", "alignment", "uniformity", "effective_rank", "lr", "knn"} <= last
    assert {"gradient/attract", "gradient/repel"} <= last
    for row in rows:
        assert math.isclose(row["pretrain/loss"], row["pretrain/attract"] + row["pretrain/repel"], rel_tol=1e-5)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["step"] == 6
    assert any(name.startswith("encoder.") for name in checkpoint["model"])
    shown = capsys.readouterr()
    assert f"{100 * result['metrics']['logreg-v1/top1']:.2f}" in shown.out
    assert "raw pixels" in shown.out
    assert "AdamW weights: " in shown.err

    stamp = (run / "result.json").stat().st_mtime_ns
    assert scclr("train", *TINY) == 0
    again = capsys.readouterr().out
    assert "finished before" in again
    assert f"{100 * result['metrics']['logreg-v1/top1']:.2f}" in again
    assert (run / "result.json").stat().st_mtime_ns == stamp
    assert scclr("train", "overwrite=true", *TINY) == 0
    assert (run / "result.json").stat().st_mtime_ns != stamp
    assert result_of(run)["metrics"] == result["metrics"]
    assert rows_of(run) == rows


def test_a_sweep_is_resumed_by_typing_it_again(scclr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scclr.train as train

    calls = []
    stage = train.pretrain_stage

    def failing(config, *rest):  # type: ignore[no-untyped-def]
        calls.append((config.alpha, config.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stage(config, *rest)

    monkeypatch.setattr(train, "pretrain_stage", failing)
    line = ["train", "-m", "alpha=0.3,0.7", "seed=0,1", *TINY]
    assert scclr(*line) == 130
    assert len(list((folder / "runs").glob("*/*/result.json"))) == 2
    assert scclr(*line) == 0
    assert calls == [(0.3, 0), (0.3, 1), (0.7, 0), (0.7, 0), (0.7, 1)]
    assert scclr(*line) == 0
    assert len(calls) == 5
    runs = [result_of(run) for run in run_folders(folder)]
    assert len({r["run"] for r in runs}) == 4
    assert len({r["group"] for r in runs}) == 2


def test_a_resumed_run_is_the_uninterrupted_run(scclr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scclr.run.checkpoint as checkpoint

    line = ["train", "checkpoint.every=1", *TINY]
    assert scclr(*line, "runs=whole") == 0
    saves = []
    save = checkpoint.save

    def killed(directory: Path, state: dict, name: str) -> None:
        save(directory, state, name)
        saves.append(state["step"])
        if saves == [1, 2, 3, 4, 5]:  # between two rows
            with open(directory / "metrics.jsonl", "a") as file:
                file.write('{"step": 6, "pretrain/loss": 1.0}\n{"step": 6, "pre')  # what a kill can leave
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    assert scclr(*line, "runs=parts") == 130
    assert list((folder / "parts").glob("*/*/result.json")) == []
    assert scclr(*line, "runs=parts") == 0
    assert saves == [1, 2, 3, 4, 5, 6]
    (whole,), (parts,) = (list((folder / name / "default").glob("*/")) for name in ("whole", "parts"))
    assert rows_of(whole) == rows_of(parts)
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert result_of(whole)["metrics"] == result_of(parts)["metrics"]


def test_probing_a_run_again_reproduces_its_numbers(scclr: Run, folder: Path) -> None:
    assert scclr("train", "seed=3", *TINY) == 0
    (run,) = run_folders(folder)
    probing = [word for word in TINY if word.startswith(("dataset", "probe"))]
    assert scclr("train", "stages=[probe]", f"init_from={run}", "name=again", *probing) == 0
    (again,) = [path for path in run_folders(folder) if path.parent.name == "again"]
    assert result_of(again)["metrics"] == result_of(run)["metrics"]
    assert result_of(again)["encoder_sha256"] == result_of(run)["encoder_sha256"]
    assert "seed3" in again.name

    other = ["dataset.classes=[3,5,8]", f"init_from={run / 'last.pt'}", "name=other"]
    assert scclr("train", "stages=[probe]", *other, *probing) == 0
    (transfer,) = [path for path in run_folders(folder) if path.parent.name == "other"]
    assert result_of(transfer)["metrics"] != result_of(run)["metrics"]
    assert result_of(transfer)["encoder_sha256"] == result_of(run)["encoder_sha256"]


def test_pretraining_can_start_from_a_run(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain]", *TINY) == 0
    (run,) = run_folders(folder)
    assert scclr("train", f"init_from={run}", "optimizer.lr=1e-12", "name=warm", *TINY) == 0
    (warm,) = [path for path in run_folders(folder) if path.parent.name == "warm"]
    weights = "encoder.layers.conv.weight"
    a, b = (torch.load(path / "last.pt", weights_only=True)["model"][weights] for path in (run, warm))
    assert torch.allclose(a, b, atol=1e-6)
    capsys.readouterr()
    assert scclr("train", f"init_from={run}", *TINY, "encoder.widths=[8,17]") == 1
    assert "do not fit" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    assert scclr("train", *TINY) == 0
    (run,) = run_folders(folder)
    before = (run / "last.pt").read_bytes()
    (run / "result.json").unlink()
    capsys.readouterr()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert scclr("train", *TINY) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "last.pt").read_bytes() == before
    assert [path.name for path in run.iterdir() if "partial" in path.name] == []


def test_another_version_cannot_resume_a_run(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr("scclr.run.checkpoint.FORMAT", 0)
        assert scclr("train", "stages=[pretrain]", *TINY) == 0
    (run,) = run_folders(folder)
    probing = [word for word in TINY if word.startswith(("dataset", "probe"))]
    assert scclr("train", "stages=[probe]", f"init_from={run}", "name=still", *probing) == 0, "weights are weights"
    (run / "result.json").unlink()
    before = (run / "last.pt").read_bytes()
    capsys.readouterr()
    assert scclr("train", "stages=[pretrain]", *TINY) == 1
    assert "type overwrite=true to begin anew" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "last.pt").read_bytes() == before
    assert scclr("train", "stages=[pretrain]", *TINY, "overwrite=true") == 0


def test_two_processes_cannot_share_a_run(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain]", *TINY) == 0
    (run,) = run_folders(folder)
    with run_lock(run, overwrite=False):
        assert scclr("train", "stages=[pretrain]", "overwrite=true", *TINY) == 1
    assert "another process" in capsys.readouterr().err


def test_a_failed_point_does_not_stop_the_sweep(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "-m", "pretrain.batch_size=5000,64", *[w for w in TINY if "batch" not in w]) == 1
    assert "larger than the 255 images" in capsys.readouterr().err
    assert len(list((folder / "runs").glob("*/*/result.json"))) == 1


@pytest.mark.parametrize("loss", sorted(path.stem for path in (conf_dir() / "loss").glob("*.yaml")))
def test_every_loss_trains(loss: str, scclr: Run, folder: Path) -> None:
    assert scclr("train", f"loss={loss}", *TINY) == 0
    (run,) = run_folders(folder)
    assert result_of(run)["oracle"] == build("loss", compose(f"loss={loss}").loss, classes=10).supervised
    assert result_of(run)["metrics"]["logreg-v1/top1"] > 0.4  # chance is 0.1


def test_a_balance_schedule_is_followed(scclr: Run, folder: Path) -> None:
    schedule = ["alpha=0.2", "alpha_schedule=linear", "alpha_end=0.7", "pretrain.log_every=1", "stages=[pretrain]"]
    assert scclr("train", *TINY, *schedule) == 0
    (run,) = run_folders(folder)
    assert [row["pretrain/alpha"] for row in rows_of(run)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    for row in rows_of(run):
        alpha, attract, repel = (row[f"pretrain/{name}"] for name in ("alpha", "attract", "repel"))
        assert row["pretrain/loss"] == pytest.approx(2 * (alpha * attract + (1 - alpha) * repel), rel=1e-5)
    assert "alpha0.2to0.7" in run.name


def test_embeddings_without_normalisation(scclr: Run, folder: Path) -> None:
    assert scclr("train", "projector.normalize=false", "loss.similarity=dot", "alpha=0.5", *TINY) == 0
    (run,) = run_folders(folder)
    assert all(math.isfinite(value) for row in rows_of(run) for value in row.values())


def test_supervised_losses_need_labels(
    scclr: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scclr.datasets import ImageSet
    from scclr.datasets.digits import Digits

    read = Digits.read

    def unlabelled(self: Digits):  # type: ignore[no-untyped-def]
        parts = read(self)
        return parts._replace(unlabelled=ImageSet(parts.train.images, torch.full_like(parts.train.labels, -1)))

    monkeypatch.setattr(Digits, "read", unlabelled)
    assert scclr("train", "loss=supcon", *TINY) == 1
    assert "loss=supcon reads labels" in capsys.readouterr().err
    assert scclr("train", *TINY) == 0


def test_a_loss_that_is_not_finite_stops_the_run(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scclr.losses import LossTerms
    from scclr.losses.balanced import BalancedLoss

    calls = []
    plain = BalancedLoss.terms

    def spoiled(self, anchors):  # type: ignore[no-untyped-def]
        calls.append(0)
        terms = plain(self, anchors)
        return LossTerms(terms.total * float("nan"), *terms[1:]) if len(calls) == 4 else terms

    monkeypatch.setattr(BalancedLoss, "terms", spoiled)
    assert scclr("train", *TINY, "pretrain.log_every=100", "pretrain.knn_every=0") == 1
    assert "not finite at step 3" in capsys.readouterr().err.splitlines()[-1]
    (run,) = run_folders(folder)
    with pytest.raises(UserError, match=r"its weights are not finite; give a checkpoint from before"):
        load(run / "crash.pt")
    crash = torch.load(run / "crash.pt", weights_only=True)
    assert torch.equal(crash["window"]["indices"], batch_indices(0, 3, 255, 64))
    assert (crash["step"], crash["config"]["seed"]) == (3, 0)
    assert not (run / "last.pt").exists()
    assert "not finite" in (run / "error.txt").read_text()


def test_the_folder_of_another_run_is_refused(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain]", *TINY) == 0
    (run,) = run_folders(folder)
    assert scclr("train", "stages=[pretrain]", "seed=1", "name=other", *TINY) == 0
    (other,) = (path for path in run_folders(folder) if path.parent.name == "other")
    for name in ("result.json", "last.pt"):
        (run / name).write_bytes((other / name).read_bytes())
        capsys.readouterr()
        assert scclr("train", "stages=[pretrain]", *TINY) == 1
        assert "holds another run (seed=1 there, 0 here)" in capsys.readouterr().err.splitlines()[-1]
        (run / "result.json").unlink(missing_ok=True)


def test_no_run_begins_on_a_full_disk(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("scclr.run.files.shutil.disk_usage", lambda _: usage(2**20))
    assert scclr("train", *TINY) == 1
    assert "1.0 MB are free on its disk; free space" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("on", [False, True])
def test_determinism_is_set_for_the_run_only(on: bool, monkeypatch: pytest.MonkeyPatch, scclr: Run) -> None:
    import scclr.train as train

    seen = []
    stages = train.run_stages

    def watched(*args):  # type: ignore[no-untyped-def]
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        stages(*args)

    monkeypatch.setattr(train, "run_stages", watched)
    assert scclr("train", "stages=[pretrain]", f"deterministic={str(on).lower()}", *TINY) == 0
    assert seen == [(on, not on)]
    assert not torch.are_deterministic_algorithms_enabled()


def lacks_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("run_stages", "end what else uses this memory, or type the same command where there is more"),
        ("forecast_collapse", "end what else uses this memory, or type the same command where there is more"),
        ("pretrain", "type pretrain.micro_batch=64, which keeps the gradient, or a smaller pretrain.batch_size"),
        (
            "knn_accuracy",
            "type smaller probe.batch_size, pretrain.knn_images or theory.images, or pretrain.quality_every=0",
        ),
    ],
)
def test_too_little_memory_is_said_in_one_line(
    place: str, advice: str, scclr: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"scclr.train.{place}", lacks_memory)
    assert scclr("train", *TINY) == 1
    expected = f"scclr train: error: CUDA out of memory. Tried to allocate 2.00 GiB.; {advice}"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("stages", "place", "rest", "smaller"),
    [
        ("[pretrain,probe]", "evaluate_each", "[probe]", "probe.batch_size=128"),
        ("[pretrain]", "measure_quality", "[probe]", "probe.batch_size=128"),
        ("[pretrain,probe,theory]", "measure", "[probe,theory]", "theory.images=2500"),
    ],
)
def test_advice_on_memory_keeps_a_finished_pretraining(
    stages: str, place: str, rest: str, smaller: str,
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as small:
        small.setattr(f"scclr.train.{place}", lacks_memory)
        assert scclr("train", f"stages={stages}", *TINY) == 1
    (run,) = run_folders(folder)
    source = f"init_from={run.relative_to(folder)}"
    again = f"scclr train stages={rest} {source} {smaller} and the dataset's keys, which keeps the pretraining"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"2.00 GiB.; type {again}")
    keys = [word for word in TINY if word.startswith(("dataset", "probe"))]
    monkeypatch.setattr("scclr.train.pretrain", lacks_memory)  # which is not called again
    assert scclr("train", f"stages={rest}", source, smaller, *keys) == 0
    with monkeypatch.context() as small:
        small.setattr(f"scclr.train.{place}", lacks_memory)
        assert scclr("train", f"stages={rest}", source, smaller, *keys, "name=again") == 1
    value = int(smaller.split("=")[1]) // 4
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; type {smaller.split('=')[0]}={value}")


@pytest.mark.parametrize(
    "message",
    [
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error in: ../NCCLUtils.hpp:275, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_allocations_of_cuda_libraries_that_fail_are_about_memory(message: str) -> None:
    assert str(machine.memory_error(RuntimeError(message), "type less")).endswith("; type less")


@pytest.mark.parametrize(
    "message",
    [
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_other_errors_of_cuda_libraries_are_not(message: str) -> None:
    assert machine.memory_error(RuntimeError(message), "type less") is None


Arithmetic = tuple[bool, bool, bool, bool, bool]


def arithmetic() -> Arithmetic:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return matmul, cudnn.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), warns


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_evaluates_is_pinned_and_what_trains_is_not(
    deterministic: bool, scclr: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scclr.train as train

    seen: dict[str, set[Arithmetic]] = {}

    def watch(name: str) -> None:
        plain = getattr(train, name)

        def watched(*args: object, **named: object) -> object:
            seen.setdefault(name, set()).add(arithmetic())
            return plain(*args, **named)

        monkeypatch.setattr(train, name, watched)

    for name in (
        "forecast_collapse",
        "pretrain",
        "knn_accuracy",
        "evaluate_each",
        "measure_quality",
        "measure",
        "bound_now",
    ):
        watch(name)
    before = arithmetic()
    words = [f"deterministic={str(deterministic).lower()}", "stages=[pretrain,probe,theory]", "theory.images=60"]
    assert scclr("train", *words, "pretrain.quality_every=1", "pretrain.bound_every=1", *TINY) == 0
    assert arithmetic() == before
    assert seen.pop("pretrain") == {(False, True, not deterministic, deterministic, False)}
    assert len(seen) == 6
    assert set.union(*seen.values()) == {(False, False, False, True, not deterministic)}


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("solver", [torch.linalg.eigh, torch.linalg.eigvalsh])
@pytest.mark.parametrize(
    ("error", "replaced"),
    [
        (torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnXsyevd`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_solver_that_fails_on_cuda_is_replaced_by_that_of_the_cpu(
    error: RuntimeError, replaced: bool, solver: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0]])

    def failing(given: torch.Tensor) -> torch.Tensor:
        if isinstance(given, OnCuda):
            raise error
        return solver(given)

    with mock.patch.object(torch.Tensor, "to", lambda self, device: self):
        if replaced:
            torch.testing.assert_close(machine.decompose(failing, x.as_subclass(OnCuda)), solver(x))
        else:
            with pytest.raises(RuntimeError, match="illegal memory access"):
                machine.decompose(failing, x.as_subclass(OnCuda))
    with pytest.raises(RuntimeError) as caught:
        machine.decompose(mock.Mock(side_effect=error), x)
    assert caught.value is error, "there is no other solver for a CPU"


def test_a_sweeper_is_given_the_validation_accuracy(scclr: Run, folder: Path) -> None:
    """The whole of Hydra's path, on which the run is composed once more, by Hydra's own ``main``."""
    import sys

    from scclr.run.result import validation_accuracy
    from scclr.train import main

    words = ["alpha=0.4", "name=sweep", *TINY]
    assert scclr("train", *words) == 0
    (run,) = run_folders(folder)
    stamp = (run / "result.json").stat().st_mtime_ns
    sys.argv = ["scclr train", "-m", *words]
    main()
    assert run_folders(folder) == [run]
    assert (run / "result.json").stat().st_mtime_ns == stamp, "the same run"
    result = result_of(run)
    assert validation_accuracy(result) == result["validation"]["logreg-v1"] != result["metrics"]["logreg-v1/top1"]
    assert validation_accuracy({"last": {"pretrain/knn": 0.5}}) == 0.5


@pytest.mark.slow
def test_pretraining_beats_raw_pixels_and_the_untrained_encoder(scclr: Run, folder: Path) -> None:
    """The claim of the product, on test images of the digits: in the mean over two seeds, and for each of them."""
    assert scclr("train", "-m", "seed=0,1", "pretrain.epochs=50", "pretrain.knn_every=0") == 0
    found = [result_of(run)["metrics"] for run in run_folders(folder)]
    assert len(found) == 2
    for baseline, margin in (("baseline/pixels/", 0.005), ("baseline/untrained/", 0.02)):
        gains = [metrics["logreg-v1/top1"] - metrics[f"{baseline}logreg-v1/top1"] for metrics in found]
        assert min(gains) > 0
        assert sum(gains) / 2 > margin

"""Runs from Python: what comes back, and that the caller's process is left as it was."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY, result_of, run_folders
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra

import scclr
from scclr.datasets.digits import Digits
from scclr.evaluate.features import encoder_hash, extract_features


@pytest.fixture
def run(folder: Path) -> "scclr.api.Run":
    return scclr.train("alpha=0.4", *TINY)


def state() -> tuple[object, ...]:
    random = torch.get_rng_state().tolist()
    settings = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return random, settings, filled, handlers, sys.stdout, sys.stderr, dict(os.environ), list(sys.path), os.getcwd()


def test_a_run_comes_back_as_it_is_loaded(run: "scclr.api.Run", folder: Path) -> None:
    (directory,) = run_folders(folder)
    assert run.directory.resolve() == directory
    assert (run.config.alpha, run.config.loss["temperature"]) == (0.4, 0.5)
    again = scclr.load(directory)
    assert again.config == run.config
    assert again.metrics == run.metrics == result_of(directory)["metrics"]
    assert encoder_hash(again.model.encoder) == result_of(directory)["encoder_sha256"]
    assert not again.model.training
    assert repr(again) == f"scclr.load({str(directory)!r})"


def test_features_are_those_of_the_evaluation(run: "scclr.api.Run") -> None:
    splits = Digits(**{k: v for k, v in run.config.dataset.items() if k != "_target_"}).load()
    images = splits.test.images
    expected = extract_features(run.model, splits.test, 512)
    assert torch.equal(run.features(images), expected)
    torch.testing.assert_close(run.features(images.float() / 255, batch_size=7), expected, rtol=1e-4, atol=1e-5)
    for wrong in (images[0], images.long(), images.flatten(1)):
        with pytest.raises(ValueError, match="give uint8 or floats"):
            run.features(wrong)


def test_the_encoder_normalizes_pixels_and_is_a_copy(run: "scclr.api.Run") -> None:
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    h, _ = run.model(images)
    by_hand = run.model.encoder((images - run.model.mean) / run.model.std)
    assert torch.equal(run.encoder(images), by_hand)
    torch.testing.assert_close(run.encoder(images), h)
    assert (run.encoder.feature_dim, run.image_size, run.encoder.training) == (16, 8, False)
    torch.nn.init.zeros_(next(run.encoder.parameters()))
    assert not torch.equal(run.encoder(images), h)
    assert torch.equal(run.model(images)[0], h)


def test_a_run_that_is_evaluated_has_the_weights_of_its_origin(run: "scclr.api.Run") -> None:
    probed = scclr.train("stages=[probe]", f"init_from={run.directory}", TINY[0], *TINY[-2:])
    assert probed.metrics == run.metrics
    assert encoder_hash(probed.model.encoder) == encoder_hash(run.model.encoder)


def test_the_process_is_left_as_it_was(folder: Path) -> None:
    before = state()
    first = scclr.train(*TINY)
    second = scclr.train("seed=1", *TINY)
    assert state() == before
    assert first.directory != second.directory
    assert scclr.train(*TINY).result == first.result, "it was finished before"


def test_a_hydra_of_the_callers_own_is_kept(folder: Path) -> None:
    with initialize(version_base=None, config_path=None):
        scclr.train("stages=[pretrain]", *TINY)
        assert GlobalHydra.instance().is_initialized()


def test_it_works_in_a_thread(folder: Path) -> None:
    thread = threading.Thread(target=scclr.train, args=("stages=[pretrain]", *TINY))
    thread.start()
    thread.join()
    assert len(scclr.results(folder / "runs")) == 1


def test_an_interrupted_call_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from Jupyter's button: the kernel gets SIGINT, the step is finished, and the checkpoint holds it."""
    from scclr.run.checkpoint import Checkpoints
    from scclr.run.checkpoint import load as load_checkpoint

    due, asked = Checkpoints.due, []

    def interrupted(self: Checkpoints, step: int) -> int:
        if step == 3 and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return due(self, step)

    monkeypatch.setattr(Checkpoints, "due", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scclr.train("stages=[pretrain]", *TINY)
    (directory,) = run_folders(folder)
    assert load_checkpoint(directory)["step"] == 3
    assert scclr.train("stages=[pretrain]", *TINY).result["last"]["pretrain/epoch"] == 2


def test_results_are_flat(run: "scclr.api.Run", folder: Path) -> None:
    scclr.train("loss=ntxent", "name=other", "seed=3", *TINY)
    rows = scclr.results("runs")
    assert [(row["loss"], row["alpha"], row["seed"], row["name"]) for row in rows] == [
        ("BalancedLoss", 0.4, 0, "default"),
        ("NTXentLoss", None, 3, "other"),
    ]
    assert rows[0]["logreg-v1/top1"] == run.metrics["logreg-v1/top1"]
    assert rows[0]["pretrain.batch_size"] == 64
    assert rows[0]["seconds.total"] > 0
    assert not any(isinstance(value, dict) for row in rows for value in row.values())
    assert scclr.results(run.directory) == rows[:1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alpha=7"], r"in \[0, 1\]"),
        (["-m", "alpha=0.1,0.2"], "one run; loop over values"),
        (["--cfg", "job"], "one run"),
        (["alpha=0.1,0.2"], "several values make a sweep"),
        (["loss=balnced"], "did you mean balanced"),
    ],
)
def test_mistakes_raise(words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(scclr.UserError, match=message):
        scclr.train(*words)
    assert list(folder.iterdir()) == []


def test_folders_without_a_finished_run_are_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(scclr.UserError, match=r"no result\.json.*give a folder such as"):
        scclr.load(folder / "empty")
    with pytest.raises(scclr.UserError, match="no finished runs"):
        scclr.results(folder)


def test_a_run_folder_that_is_misspelt_is_named(run: "scclr.api.Run") -> None:
    with pytest.raises(scclr.UserError, match=f"did you mean {run.directory}\\?"):
        scclr.load(f"{run.directory}"[:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["scclr.__doc__", "import scclr.api", "from scclr.train import run", "import scclr.train"]
)
def test_the_name_is_a_call_whatever_was_imported_before(first: str) -> None:
    """``scclr.train`` is a function and a module."""
    probe = f"import scclr; {first}; scclr.train('alpha=7')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "UserError: alpha=7.0: the balance is a number in [0, 1]" in done.stderr


def test_the_import_takes_no_time() -> None:
    probe = "import time; t = time.perf_counter(); import scclr; print(time.perf_counter() - t)"
    took = [
        float(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout) for _ in range(3)
    ]
    assert min(took) < 0.1


def test_every_loss_is_exported() -> None:
    import scclr.losses
    from scclr.config.compose import conf_dir

    for path in conf_dir().glob("loss/*.yaml"):
        name = path.read_text().split("_target_: ")[1].split("\n")[0].rsplit(".", 1)[1]
        assert issubclass(getattr(scclr.losses, name), scclr.losses.Loss)
        assert name in scclr.losses.__all__

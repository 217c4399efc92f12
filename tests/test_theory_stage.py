"""The theory of whole runs: what the stage writes, what training foresees and records, and that it changes nothing."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_folders

from scclr.config import TheoryConfig, UserError
from scclr.datasets import ImageSet
from scclr.distributed import World
from scclr.losses import Softmax
from scclr.theory.forecast import Forecast, forecast
from scclr.theory.stage import measure

Run = Callable[..., int]
SMALL = ["theory.images=80", "theory.views=2", "theory.temperatures=[0.5,1]"]
DATA = [word for word in TINY if word.startswith("dataset")]


def read(folder: Path, name: str) -> dict:
    found: dict = json.loads((folder / name).read_text())
    return found


def test_the_stage_after_training_and_alone(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain,theory]", "seed=3", "augment.rotation=20", *TINY, *SMALL) == 0
    (run,) = run_folders(folder)
    theory, metrics = read(run, "theory.json"), read(run, "result.json")["metrics"]
    bias = theory["z"]["bias"]
    assert math.isclose(sum(bias[name]["value"] for name in ("mean_norm2", "s_b", "b2", "v_aug")), 1, abs_tol=1e-12)
    assert theory["identity_error"] < 1e-12
    assert [one["temperature"] for one in theory["bound"]] == [0.5, 1.0]
    assert metrics["theory/z/b2"] == bias["b2"]["value"]
    assert metrics["theory/h/b2/se"] == theory["h"]["bias"]["b2"]["se"] > 0
    assert metrics["theory/bound/t5_slack"] == theory["bound"][0]["t5_slack"]["value"] > 0
    shown = capsys.readouterr().out
    for text in ("A_sup - A_ssl = B2 holds to", f"{bias['b2']['value']:.4f} ± {bias['b2']['se']:.4f}", "T5  certified"):
        assert text in shown

    alone = ["stages=[theory]", f"init_from={run}", *DATA, *SMALL]
    assert scclr("train", *alone, "experiment=same") == 0
    assert scclr("train", *alone, "experiment=other", "augment=none", "dataset.classes=[3,5,8]") == 0
    folders = {path.parent.name: path for path in run_folders(folder)}
    assert read(folders["same"], "result.json")["metrics"] == pytest.approx(metrics, abs=1e-5)
    other = read(folders["other"], "theory.json")["h"]["bias"]
    assert abs(other["v_aug"]["value"]) < 1e-6
    assert len(other["by_class"]) == 3
    capsys.readouterr()
    assert scclr("train", *alone, "encoder=resnet18") == 1
    assert "stages=[theory] takes encoder from init_from; drop it" in capsys.readouterr().err
    assert scclr("train", "stages=[probe]", f"init_from={run}", "augment=none") == 1
    assert "takes augment from init_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("theory.views=1", "needs two views or more"),
        ("theory.temperatures=[]", "one or more positive numbers"),
        ("theory.temperatures=[0.5,-1]", "one or more positive numbers"),
        ("theory.images=3", "at least 4"),
    ],
)
def test_budgets_are_checked(word: str, message: str, scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain,theory]", *TINY, word) == 1
    assert message in capsys.readouterr().err


def test_what_cannot_be_measured_is_a_user_error(folder: Path) -> None:
    from test_pretrain import compose, parts

    config = compose(*TINY)
    model, _, augment, _ = parts(config)
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, budget = torch.arange(24) % 3, TheoryConfig(24, 2, [0.5])

    def stage(labels: torch.Tensor) -> dict:
        return measure(
            model, ImageSet(images, labels), augment, budget, alpha=0.5, temperature=0.5, images=64, batch=10, seed=0,
            world=World(),
        )  # fmt: skip

    training, state = model.training, torch.get_rng_state()
    assert stage(labels)["dropped"] == []
    assert model.training == training
    assert torch.equal(state, torch.get_rng_state())
    labels[0] = 3
    assert stage(labels)["dropped"] == [3]
    with pytest.raises(UserError, match="theory: 24 images have no label"):
        stage(torch.full((24,), -1))
    with torch.no_grad():
        model.encoder.layers.conv.weight.fill_(math.nan)
    with pytest.raises(UserError, match="rows of z are not finite"):
        stage(labels)


def test_a_grey_encoder_sees_colour_and_the_other_way() -> None:
    from test_pretrain import compose, parts

    from scclr.theory.stage import embed

    config = compose(*TINY)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for channels in (1, 3):
        model, _, augment, _ = parts(config, channels)
        grey, colour = (
            embed(model.eval(), ImageSet(x, torch.zeros(6, dtype=torch.int64)), augment, 3, 4, seed=0)[0]
            for x in (images, images.repeat(1, 3, 1, 1))
        )
        assert grey.shape == (6, 3, 16)
        torch.testing.assert_close(grey, colour, atol=1e-4, rtol=1e-3)


def test_training_is_warned_and_goes_on(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["stages=[pretrain]", *TINY, "pretrain.epochs=1"]
    assert scclr("train", "alpha=0.99", "augment.crop_scale=[0.1,0.3]", *line) == 0
    (run,) = run_folders(folder)
    foreseen = read(run, "result.json")["forecast"]
    assert foreseen["alpha_col"] == pytest.approx(1 / (2 - foreseen["r_max"]))
    warned = [text for text in capsys.readouterr().err.splitlines() if "collapse" in text]
    assert len(warned) == 1
    assert f"alpha=0.99 is above {foreseen['alpha_col']:.3f}" in warned[0]
    assert scclr("train", "alpha=0.3", "loss.temperature=0.1", *line) == 0
    assert "loss=decoupled" in capsys.readouterr().err


def test_a_forecast_leaves_the_model_as_it_was() -> None:
    from test_pretrain import compose, parts

    model, _, augment, _ = parts(compose(*TINY))
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data, state = ImageSet(images, torch.zeros(24, dtype=torch.int64)), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    both = [forecast(model, data, augment, Softmax(0.1, decoupled=on), batch=8, seed=0) for on in (False, True)]
    assert both[0].r_max == both[1].r_max
    assert both[0].alpha_mis > both[1].alpha_mis == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())


def test_edges() -> None:
    edges = Forecast(0.5, 0.667, 0.2)
    assert edges.warnings([0.5, 0.6]) == []
    assert len(edges.warnings([0.1, 0.7])) == 2


def test_measuring_changes_nothing(scclr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["train", "stages=[pretrain]", "pretrain.log_every=1", *TINY]
    assert scclr(*line, "runs=measured") == 0
    monkeypatch.setattr("scclr.train.foresee", lambda *_, **__: None)
    monkeypatch.setattr("scclr.pretrain.geometry", lambda *_: {})
    assert scclr(*line, "runs=bare") == 0
    measured, bare = (next((folder / runs / "default").glob("*/")) for runs in ("measured", "bare"))
    a, b = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (measured, bare))
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows, plain = (
        [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()] for run in (measured, bare)
    )
    assert [row["pretrain/loss"] for row in rows] == [row["pretrain/loss"] for row in plain]
    admission = {"r_star", "p_positive", "repelled", "q_same"}
    assert {f"pretrain/admission/{name}" for name in admission} | {"pretrain/gradient/cosine"} <= rows[-1].keys()
    assert -1 <= rows[-1]["pretrain/gradient/cosine"] <= 1
    assert all(0 < row["pretrain/admission/q_same"] < 1 for row in rows)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder: Path) -> None:
    command = [sys.executable, "-m", "scclr", "train", "stages=[pretrain,theory]", *TINY, "theory.images=200"]
    command += [
        "probe.batch_size=256",
        "optimizer=sgd",
        "optimizer.lr=1e-9",
        "tracking.mode=disabled",
        "pretrain.epochs=1",
        "pretrain.warmup_epochs=0",
    ]
    for n in (1, 2):
        done = subprocess.run([*command, f"nproc={n}", f"runs=n{n}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (read(next((folder / f"n{n}" / "default").glob("*/")), "theory.json") for n in (1, 2))
    for space in "zh":
        for name in ("b2", "v_aug", "s_b"):
            assert two[space]["bias"][name] == pytest.approx(one[space]["bias"][name], abs=1e-6)
    assert two["bound"][1]["t5"] == pytest.approx(one["bound"][1]["t5"], abs=1e-6)
    assert two["thresholds"]["correlations"] == pytest.approx(one["thresholds"]["correlations"], abs=1e-5)

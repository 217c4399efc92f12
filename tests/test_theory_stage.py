"""The theory of whole runs: what the stage writes, what is forecast before training, and that measuring is passive."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose, noise, result_of, rows_of, run_folders, training
from torch import Tensor

from scclr.config.errors import UserError
from scclr.datasets import ImageSet
from scclr.evaluate.features import chosen_rows
from scclr.losses import LogSumExpForm
from scclr.theory.embed import embed
from scclr.theory.forecast import Forecast, forecast_collapse
from scclr.theory.report import BOUND_METRICS, headline, measure, table
from scclr.theory.thresholds import Edges, misalignment_onset

Run = Callable[..., int]
SMALL = ["theory.images=80", "theory.views=2", "theory.temperatures=[0.5,1]"]
DATA = [word for word in TINY if word.startswith("dataset")]


def theory_of(run: Path) -> dict:
    """The ``theory.json`` of a run folder."""
    found: dict = json.loads((run / "theory.json").read_text())
    return found


def test_the_stage_after_training_and_alone(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain,theory]", "seed=3", "augment.rotation=20", *TINY, *SMALL) == 0
    (run,) = run_folders(folder)
    theory, metrics = theory_of(run), result_of(run)["metrics"]
    assert [one["temperature"] for one in theory["bound"]] == [0.5, 1.0]
    assert headline(theory).items() <= metrics.items()
    assert table(theory) in capsys.readouterr().out
    assert not any("bound" in name for row in rows_of(run) for name in row)

    alone = ["stages=[theory]", f"init_from={run}", *DATA, *SMALL]
    assert scclr("train", *alone, "name=same") == 0
    assert scclr("train", *alone, "name=other", "augment=none", "dataset.classes=[3,5,8]") == 0
    folders = {path.parent.name: path for path in run_folders(folder)}
    assert result_of(folders["same"])["metrics"] == pytest.approx(metrics, abs=1e-5)
    other = theory_of(folders["other"])["h"]["bias"]
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
        ("theory.views=1", "theory.views=1: give a value from 2"),
        ("theory.temperatures=[]", "one or more positive numbers"),
        ("theory.temperatures=[0.5,-1]", "one or more positive numbers"),
        ("theory.images=3", "theory.images=3: give a value from 4"),
        ("theory.images=4", "2 images"),  # four digits are hardly ever two of one class and two of another
    ],
)
def test_a_theory_that_cannot_be_computed_is_refused_before_training(
    word: str, message: str, scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scclr("train", "stages=[pretrain,theory]", *TINY, word) == 1
    assert message in capsys.readouterr().err
    assert not list(folder.glob("runs/*/*/metrics.jsonl"))


@pytest.mark.parametrize("words", [[], ["alpha=0.3", "alpha_schedule=linear", "alpha_end=0.6"], ["loss=spectral"]])
def test_the_bound_over_the_training_ends_at_that_of_the_stage(words: list[str], scclr: Run, folder: Path) -> None:
    line = ["stages=[pretrain,theory]", *TINY, *SMALL, *words]
    assert scclr("train", *line, "pretrain.bound_every=1", "name=logged") == 0
    assert scclr("train", *line, "name=plain") == 0
    (logged,), (plain,) = ((folder / "runs" / name).glob("*/") for name in ("logged", "plain"))
    rows = [row for row in rows_of(logged) if "pretrain/bound/slack" in row]
    assert [row["step"] for row in rows] == [3, 6]
    bounds = theory_of(logged)["bound"]
    at = bounds[0] if not words else min(bounds, key=lambda one: one["upper_bound"]["value"])
    found = {name.removeprefix("pretrain/bound/"): value for name, value in rows[-1].items() if "/bound/" in name}
    assert found == {name: at[name]["value"] for name in BOUND_METRICS}
    assert rows[0]["pretrain/bound/slack"] != rows[1]["pretrain/bound/slack"]
    same = {name: value for name, value in rows_of(plain)[-1].items() if "second" not in name}
    assert same.items() <= rows[-1].items(), "measuring changes no training"


def test_labels_for_the_bound_are_asked_for_before_training(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scclr("train", "stages=[pretrain]", "pretrain.bound_every=1", *TINY, "theory.images=4") == 1
    assert "type a larger theory.images" in capsys.readouterr().err
    assert not list(folder.glob("runs/*/*/metrics.jsonl"))


def measured(
    labels: Tensor, weight: float | None = None, form: LogSumExpForm | None = None, words: tuple[str, ...] = ()
) -> dict:
    """``measure`` of a small untrained model on random images, ``weight`` in all of its first convolution."""
    own = ["theory.images=24", "theory.views=2", "theory.temperatures=[0.5]", "alpha=0.25", "loss.temperature=1"]
    config = compose(*TINY, *own, "pretrain.batch_size=64", "probe.batch_size=10", *words)
    state, augment = training(config)
    if weight is not None:
        torch.nn.init.constant_(state.model.encoder.layers.conv.weight, weight)  # type: ignore[union-attr, arg-type]
    data = ImageSet(noise(len(labels)).images, labels)
    before, random = state.model.training, torch.get_rng_state()
    try:
        return measure(state.model, data, augment, config, form)
    finally:
        assert state.model.training == before
        assert torch.equal(random, torch.get_rng_state())


def test_measured_numbers_their_headline_and_their_table() -> None:
    labels = torch.arange(30) % 3
    labels[0], labels[chosen_rows(30, 0, 24)[0]] = 0, 3  # one class with one image
    theory = measured(labels, form=LogSumExpForm(0.2, decoupled=False))
    assert theory["dropped"] == [3]
    assert theory["lam"] == 3
    assert theory["identity_error"] < 1e-12
    bias, collapse = theory["z"]["bias"], theory["h"]["collapse"]
    assert math.isclose(sum(bias[name]["value"] for name in ("mean_norm2", "s_b", "b2", "v_aug")), 1, abs_tol=1e-12)
    half, one = theory["bound"]
    assert (half["temperature"], one["temperature"]) == (0.5, 1.0)
    found = headline(theory)
    assert found["theory/z/b2"] == bias["b2"]["value"]
    assert found["theory/h/b2/se"] == theory["h"]["bias"]["b2"]["se"] > 0
    assert {name: found[f"theory/bound/{name}"] for name in BOUND_METRICS} == {
        name: one[name]["value"] for name in BOUND_METRICS
    }
    assert found["theory/h/cdnv"] == collapse["cdnv"]
    assert found["theory/z/effective_rank"] == theory["z"]["collapse"]["effective_rank"]
    assert json.loads(json.dumps(theory, allow_nan=False)) == theory
    lines = table(theory).splitlines()
    assert max(map(len, lines)) <= 120
    for text in (
        f"{bias['b2']['value']:.4f} ± {bias['b2']['se']:.4f}",
        f"between {theory['objective']['lower']['value']:.4f}",
        f"{collapse['cdnv']:.4f}",
        f"{collapse['effective_rank']:.4f}",
        f"{one['upper_bound']['value']:.4f}",
        "theory.json holds the bounds at temperatures 0.5 too",
        "classes 3",
        f"above alpha = {theory['thresholds']['alpha_col']:.3f}",
        f"above alpha = {theory['thresholds']['alpha_c']:.3f}",
        f"below alpha = {theory['thresholds']['alpha_mis']:.3f}",
    ):
        assert any(text in line for line in lines), text


def test_the_table_has_the_bound_of_the_training_or_else_the_tightest() -> None:
    theory = measured(torch.arange(30) % 3)
    half, one = theory["bound"]
    assert half["upper_bound"]["value"] < one["upper_bound"]["value"]
    for temperature, shown, other in ((1.0, one, half), (None, half, one)):
        text = table({**theory, "temperature": temperature})
        assert f"{shown['upper_bound']['value']:.4f}" in text
        assert f"{other['upper_bound']['value']:.4f}" not in text


def test_thresholds_are_those_of_the_loss() -> None:
    """The decoupled loss never separates positives, and of a loss of another form nothing is said."""
    labels = torch.arange(30) % 3
    decoupled, other = (measured(labels, form=form) for form in (LogSumExpForm(0.2, decoupled=True), None))
    assert decoupled["thresholds"]["alpha_mis"] == 0 < decoupled["thresholds"]["alpha_c"]
    assert "separate" not in table(decoupled).split("collapse")[-1].replace("well-separated", "")
    assert [other["thresholds"][name] for name in Edges._fields] == [None] * 4
    assert "alpha = " not in "".join(table(other).splitlines()[2:])
    assert not any("alpha_" in name for name in headline(other))


def test_thresholds_are_those_of_the_views_and_the_dimensions_of_the_training() -> None:
    labels, form = torch.arange(30) % 3, LogSumExpForm(0.2, decoupled=False)
    pair, three = (measured(labels, form=form, words=words) for words in ((), ("augment.views=[{},{},{}]",)))
    for theory, views in ((pair, 2), (three, 3)):
        onset = misalignment_onset(64, 0.2, views=views)
        assert (theory["thresholds"]["alpha_mis"], theory["thresholds"]["alpha_mis_exact"]) == (onset, False)
        assert f"below alpha = {onset:.3f} the best embedding may separate positives" in table(theory)
    wide = measured(labels, form=form, words=("projector.out_dim=63",))
    assert wide["thresholds"]["alpha_mis_exact"]
    assert "the best embedding separates positives" in table(wide)


@pytest.mark.parametrize("loss", ["infonce", "debiased", "hard_negative", "supcon", "nscl", "prototype", "spectral"])
def test_nothing_is_forecast_where_nothing_is_proved(
    loss: str, scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"loss={loss}", "alpha=0.01", *(["loss.temperature=0.1"] if loss != "spectral" else [])]
    assert scclr("train", "stages=[pretrain,theory]", *words, *TINY, *SMALL, "pretrain.epochs=1") == 0
    said = capsys.readouterr()
    assert "apart" not in said.err + said.out
    assert " is below " not in said.err
    (run,) = run_folders(folder)
    assert result_of(run)["forecast"] is None
    assert not any("alpha_" in name for name in result_of(run)["metrics"])
    assert theory_of(run)["thresholds"]["alpha_col"] is None


def test_what_cannot_be_measured_is_a_user_error() -> None:
    with pytest.raises(UserError, match="theory: 24 images have no label"):
        measured(torch.full((24,), -1))
    with pytest.raises(UserError, match="theory: 48 rows of z are not finite"):
        measured(torch.arange(24) % 3, math.nan)


def test_a_grey_encoder_takes_colour_images_and_a_colour_encoder_grey_ones() -> None:
    images = noise(6).images
    assert isinstance(images, Tensor)
    for channels in (1, 3):
        state, augment = training(compose(*TINY), channels)
        grey, colour = (
            embed(state.model.eval(), ImageSet(x, torch.zeros(6, dtype=torch.int64)), augment, 3, 4, seed=0)
            for x in (images, images.repeat(1, 3, 1, 1))
        )
        assert [x.shape for x in grey] == [(6, 3, 16), (6, 3, 16)]
        torch.testing.assert_close(grey, colour, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("processes", [2, 3, 5])  # shares of 2 and 1, of 1 each, and two empty ones
def test_the_shares_of_processes_join_to_the_whole(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, augment = training(compose(*TINY))
    whole = embed(state.model.eval(), noise(11), augment, 2, 4, seed=0)
    shares: list[Tensor] = []
    monkeypatch.setattr("scclr.theory.embed.world_size", lambda: processes)
    monkeypatch.setattr("scclr.theory.embed.gather", lambda x: (shares.append(x), x)[1])
    for rank in range(processes):
        monkeypatch.setattr("scclr.theory.embed.rank", lambda rank=rank: rank)
        embed(state.model, noise(11), augment, 2, 4, seed=0)
    for rows, number in zip(whole, range(2), strict=True):  # h, then z
        joined = torch.nn.functional.normalize(torch.cat(shares[number::2])[:11], dim=2)
        assert torch.equal(joined, rows)


def test_training_beyond_the_forecast_is_warned_and_goes_on(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stages=[pretrain]", *TINY, "pretrain.epochs=1"]
    assert scclr("train", "alpha=0.99", "augment.crop_scale=[0.1,0.3]", *line) == 0
    (run,) = run_folders(folder)
    forecast = result_of(run)["forecast"]
    assert forecast["alpha_col"] == pytest.approx(1 / (2 - forecast["r_max"]))
    warned = [text for text in capsys.readouterr().err.splitlines() if "collapse" in text]
    assert len(warned) == 1
    assert f"alpha=0.99 is above {forecast['alpha_col']:.3f}" in warned[0]
    assert scclr("train", "alpha=0.3", "loss.temperature=0.1", *line) == 0
    assert "loss=decoupled" in capsys.readouterr().err


def test_a_forecast_leaves_the_model_unchanged() -> None:
    state, augment = training(compose(*TINY))
    model, random = state.model.eval(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coupled, decoupled = (
        forecast_collapse(model, noise(24), augment, LogSumExpForm(0.1, decoupled=on), batch=8, seed=0)
        for on in (False, True)
    )
    assert coupled.r_max == decoupled.r_max
    assert coupled.alpha_mis > decoupled.alpha_mis == 0
    assert (coupled.alpha_mis_exact, decoupled.alpha_mis_exact) == (True, True)  # 16 dimensions, 8 images
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(random, torch.get_rng_state())


def test_a_forecast_warns_beyond_each_end_of_its_range() -> None:
    forecast = Forecast(r_max=0.5, alpha_col=0.667, alpha_mis=0.2, alpha_mis_exact=True)
    assert forecast.warnings([0.2, 0.667]) == []
    above, below = forecast.warnings([0.1, 0.7])
    assert above.startswith("alpha=0.7 is above 0.667")
    assert below.startswith("alpha=0.1 is below 0.200")
    assert "the best embedding separates positives" in below
    (below,) = replace(forecast, alpha_mis_exact=False).warnings([0.1])
    assert "the best embedding may separate positives" in below


def test_a_forecast_is_for_the_views_of_a_step() -> None:
    state, augment = training(compose(*TINY, "augment.views=[{},{},{},{}]"))
    form = LogSumExpForm(0.2, decoupled=False)
    found = forecast_collapse(state.model, noise(64), augment, form, batch=64, seed=0)
    assert found.alpha_mis == misalignment_onset(64, 0.2, views=4)
    assert not found.alpha_mis_exact


def test_measuring_changes_no_training(scclr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["train", "stages=[pretrain]", "pretrain.log_every=1", *TINY]
    assert scclr(*line, "runs=measured") == 0
    monkeypatch.setattr("scclr.train.forecast_collapse", lambda *_, **__: Forecast(0.5, 0.667, 0.0, True))
    monkeypatch.setattr("scclr.pretrain.loop.embedding_metrics", lambda *_: {})
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
    assert not any(name.startswith("pretrain/admission") for name in plain[-1])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder: Path) -> None:
    command = [sys.executable, "-m", "scclr", "train", "stages=[pretrain,theory]", *TINY, "theory.images=200"]
    command += ["probe.batch_size=64", "optimizer=sgd", "optimizer.lr=1e-9", "pretrain.epochs=1", "pretrain.warmup=0"]
    for n in (1, 2):
        done = subprocess.run([*command, f"nproc={n}", f"runs=n{n}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (theory_of(next((folder / f"n{n}" / "default").glob("*/"))) for n in (1, 2))
    for space in "zh":
        for name in ("b2", "v_aug", "s_b"):
            assert two[space]["bias"][name] == pytest.approx(one[space]["bias"][name], abs=1e-6)
    assert two["bound"][1]["upper_bound"] == pytest.approx(one["bound"][1]["upper_bound"], abs=1e-6)
    assert two["thresholds"]["correlations"] == pytest.approx(one["thresholds"]["correlations"], abs=1e-5)

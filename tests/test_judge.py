"""``scripts/judge.py``: runs that satisfy a prediction, runs that violate it, and runs that cannot be judged."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY, run_folders
from report_runs import write_run
from scipy.stats import spearmanr

from scclr.report.runs import Run, axes
from scclr.theory.moments import prototype_bias

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import judge
from judges import JUDGES
from judges.collapse import H_ALONE, measure
from judges.supcon import of_run, supcon_difference
from judges.verdict import FAILS, HOLDS, UNDECIDED, above, at_most, differs, within

Command = Callable[..., int]
Made = Iterator[tuple[list[str], dict[str, float]]]  # the words of a run and its metrics
SEEDS = (0, 1, 2)
SMALL = ["encoder.widths=[8,16]"]
PROBE, NCC = "logreg-v1/top1", "z/ncc-v1/top1"
noise = np.random.default_rng(0).normal(0, 1e-4, 10**4)


def made_of(made: Made) -> list[Run]:
    """Runs as ``judge.read`` returns them, without folders: each is named by its words."""
    found = []
    for number, (words, metrics) in enumerate(made):
        settings: dict[str, object] = {"alpha": 0.5, "loss": "balanced", "loss.temperature": 0.5}
        settings |= {key: yaml.safe_load(value) for key, value in (word.split("=") for word in words)}
        seed = settings.pop("seed")
        group = " ".join(word for word in words if not word.startswith("seed="))
        close = {key: value + noise[97 * number + place] for place, (key, value) in enumerate(metrics.items())}
        result = {"config": {"seed": seed}, "group": group}
        found.append(Run(Path(*words), "runs", result, settings, {**judge.numeric(settings), **close}))
    return found


def outcomes(name: str, made: Made) -> dict[str, str]:
    """The outcome of every claim of the judge ``name`` on these runs."""
    runs = made_of(made)
    judge.check(runs, axes(runs), JUDGES[name])
    return {verdict.claim: verdict.outcome for verdict in JUDGES[name].rule(runs)}


def seeded(words: list[str], metrics: dict[str, float], seeds: tuple[int, ...] = SEEDS) -> Made:
    for seed in seeds:
        yield [*words, f"seed={seed}"], metrics


# The rules -----------------------------------------------------------------------------------------------------------


def test_a_rule_decides_when_chance_is_excluded() -> None:
    values = [1.0, 1.1, 1.2]
    assert above(values) == HOLDS
    assert above([-x for x in values]) == FAILS
    assert above([0.1, -0.05, 0.2]) == UNDECIDED, "on the right side, but 0 is in the interval"
    assert above([1.0, 1.1]) == UNDECIDED, "two seeds"
    assert above([0.0, 0.0, 0.0]) == FAILS
    assert (at_most(values, 2), at_most(values, 1), at_most([0.5, 0.9, 1.2], 1)) == (HOLDS, FAILS, UNDECIDED)
    assert (within([0.0, 0.01, -0.01], 0.05), within([0.1, 0.1, 0.1], 0.05)) == (HOLDS, FAILS)
    assert within([-0.1, -0.1, -0.1], 0.05) == FAILS
    assert differs(values, 0.01, 0.05) == HOLDS
    assert differs([0.0, 0.01, -0.01], 0.5, 0.05) == FAILS
    assert differs(values, 0.2, 0.05) == UNDECIDED


# Each experiment -----------------------------------------------------------------------------------------------------


def grid(v_aug: Callable[[float], float], bias: Callable[[float], float]) -> Made:
    """Alphas of which the last has collapsed; the accuracy falls with I_B, which is ``bias``."""
    for alpha in (0.2, 0.25, 0.3, 0.35, 0.5, 0.6, 0.7, 0.9):
        collapsed = alpha == 0.9
        metrics = {
            "theory/z/v_aug": v_aug(alpha), "theory/repel": alpha, "theory/z/s_b": 0.3,
            "theory/z/mean_norm2": 0.99 if collapsed else 0.1, "theory/z/b2": 0.0 if collapsed else 0.1 + alpha % 0.3,
            "theory/z/b2/se": 0.001, PROBE: 0.9 - alpha / 10, "quality/h/rankme": 20 - alpha,
            "quality/h/alpha_req": 1.5 + alpha, NCC: 0.1 if collapsed else 0.9 - bias(alpha) / 10,
            "theory/h/i_b": 0.8, **({} if collapsed else {"theory/z/i_b": bias(alpha)}),
        }  # fmt: skip
        yield from seeded([f"alpha={alpha}"], metrics)


def test_balance_grid() -> None:
    good = outcomes("balance_grid", grid(lambda a: 0.6 - a / 2, lambda a: 0.2 + a / 2))
    assert good == {
        "E1: theory/z/v_aug falls with alpha at temperature 0.5": HOLDS,
        "E1: theory/repel rises with alpha at temperature 0.5": HOLDS,
        "E5b: I_B, and not B2, tells the accuracy of different alphas at temperature 0.5": HOLDS,
        "E7: SupCon with positives from other images exceeds SimCLR by 2 alpha B2 / tau": UNDECIDED,
        f"quality/h/rankme orders runs by {PROBE}": HOLDS,
        f"-|quality/h/alpha_req - 1| orders runs by {PROBE}": HOLDS,
        "exploratory: I_B differs between z and h at temperature 0.5": HOLDS,
    }
    swapped = outcomes("balance_grid", grid(lambda a: 0.6 - (1.1 - a if a in (0.5, 0.6) else a) / 2, lambda a: 0.8))
    assert swapped["E1: theory/z/v_aug falls with alpha at temperature 0.5"] == FAILS, "ranks are nearly in order"
    bumpy = outcomes("balance_grid", grid(lambda a: 0.6 - a / 2 + 0.2 * (a == 0.5), lambda a: 0.8))
    assert bumpy["E1: theory/z/v_aug falls with alpha at temperature 0.5"] == FAILS
    assert bumpy["E5b: I_B, and not B2, tells the accuracy of different alphas at temperature 0.5"] != HOLDS
    assert bumpy["exploratory: I_B differs between z and h at temperature 0.5"] == FAILS


@pytest.mark.parametrize(("off", "outcome"), [(0.0, HOLDS), (0.1, FAILS)])
def test_supcon_and_simclr_by_their_standard_errors(off: float, outcome: str) -> None:
    def made() -> Made:
        for words, metrics in grid(lambda a: 0.6 - a / 2, lambda a: 0.2 + a / 2):
            alpha = float(words[0].split("=")[1])
            exact = 4 * alpha * metrics["theory/z/b2"]
            yield words, {**metrics, "supcon/difference": exact + off, "supcon/difference/se": 0.01}

    claim = "E7: SupCon with positives from other images exceeds SimCLR by 2 alpha B2 / tau"
    assert outcomes("balance_grid", made())[claim] == outcome


def thresholds(strong: float, weak: float, weak_hot: float) -> Made:
    """Two augmentations with forecasts 0.6 and 0.9, which collapse above the given alphas at two temperatures."""
    for crop, forecast, places in (("[0.1,1.0]", 0.6, (strong, strong)), ("[0.8,1.0]", 0.9, (weak, weak_hot))):
        for temperature, place in zip((0.2, 0.5), places, strict=True):
            for alpha in (0.54, 0.58, 0.62, 0.66, 0.86, 0.88, 0.92, 0.98):
                words = [f"augment.crop_scale={crop}", f"loss.temperature={temperature}", f"alpha={alpha}"]
                collapsed = {"theory/z/mean_norm2": 0.99 if alpha > place else 0.1, "theory/z/v_aug": 0.1}
                yield from seeded(words, {**collapsed, "forecast/alpha_col": forecast, H_ALONE: forecast - 0.1})


def test_collapse() -> None:
    good = outcomes("collapse", thresholds(0.59, 0.89, 0.89))
    assert list(good.values()) == [HOLDS, FAILS, HOLDS, HOLDS], good
    moved = outcomes("collapse", thresholds(0.53, 0.89, 0.95))
    assert list(moved.values()) == [UNDECIDED if not moved else HOLDS, FAILS, FAILS, UNDECIDED], moved
    other = outcomes("collapse", thresholds(0.89, 0.59, 0.59))
    assert list(other.values()) == [FAILS, FAILS, HOLDS, FAILS], other


def many_classes(best: dict[str, float], hot_best: dict[str, float]) -> Made:
    for temperature, chosen in (("0.1", best), ("0.5", hot_best)):
        for kept, peak in chosen.items():
            for alpha in (0.2, 0.35, 0.5, 0.65):
                words = [f"dataset.classes={kept}", f"loss.temperature={temperature}", f"alpha={alpha}"]
                yield from seeded(words, {NCC: 0.9 - abs(alpha - peak)})


def test_classes() -> None:
    same, falling = dict.fromkeys(("[4,6]", "[0,2,3]", "null"), 0.5), {"[4,6]": 0.65, "[0,2,3]": 0.5, "null": 0.35}
    rising = dict(zip(same, (0.35, 0.35, 0.5), strict=True))
    assert list(outcomes("classes", many_classes(same, falling)).values()) == [HOLDS, HOLDS]
    assert list(outcomes("classes", many_classes(falling, rising)).values()) == [FAILS, FAILS]
    edge = dict.fromkeys(same, 0.9)  # all are best at the last alpha
    assert list(outcomes("classes", many_classes(edge, edge)).values()) == [UNDECIDED, UNDECIDED]


def tails(peaks: tuple[float, float, float], rise: float) -> Made:
    for ratio, peak in zip((1, 10, 50), peaks, strict=True):
        for alpha in (0.35, 0.5, 0.6, 0.7):
            metrics = {"theory/z/b2": 0.1 + rise * ratio, "theory/z/mean_norm2": 0.1}
            metrics["z/ncc-v1/balanced"] = 0.9 - abs(alpha - peak)
            yield from seeded([f"dataset.imbalance={ratio}", f"alpha={alpha}"], metrics)


def test_long_tail() -> None:
    assert list(outcomes("long_tail", tails((0.5, 0.5, 0.6), 0.001)).values()) == [HOLDS, HOLDS]
    assert list(outcomes("long_tail", tails((0.6, 0.5, 0.5), -0.001)).values()) == [FAILS, FAILS]


def ladder(slope: float, spread: float) -> Made:
    """Eight augmentations, of which the first two have the same bias, and accuracies that differ by ``spread``."""
    for number, rotation in enumerate((0, 5, 10, 15, 20, 25, 30, 35)):
        bias = max(number, 1) / 20
        accuracy = 0.9 + slope * bias + (spread if number == 0 else 0.0)
        metrics = {"theory/z/b2": bias, "theory/z/b1": bias**0.5, PROBE: accuracy}
        yield from seeded([f"augment.rotation={rotation}"], metrics)


def test_bias_ladder() -> None:
    assert list(outcomes("bias_ladder", ladder(-0.2, 0.03)).values()) == [HOLDS, HOLDS, HOLDS, HOLDS]
    assert list(outcomes("bias_ladder", ladder(0.2, 0.0)).values()) == [FAILS, FAILS, FAILS, FAILS]


def test_what_removes_the_bias_is_told_apart() -> None:
    """Jitter, with contrast beside it, removes bias and helps; rotation removes as much and costs as much."""
    made = []
    for brightness, rotation in product((0, 0.8), (5, 45)):
        metrics = {"theory/z/b2": 0.5 - brightness / 4 - rotation / 200, "theory/z/b1": 0.5}
        metrics[PROBE] = 0.8 + brightness / 10 - rotation / 500
        words = [f"augment.{key}={brightness}" for key in ("brightness", "contrast")]
        made += list(seeded([*words, f"augment.rotation={rotation}"], metrics))
    found = {claim.split()[-1]: outcome for claim, outcome in outcomes("bias_ladder", made).items()}
    assert (found["augment.brightness"], found["augment.rotation"]) == (HOLDS, FAILS)
    assert "augment.contrast" not in found, "it follows the brightness"


def low(balanced: float, decoupled: float) -> Made:
    for loss, slope in (("balanced", balanced), ("decoupled", decoupled)):
        for alpha in (0.3, 0.4, 0.5):
            metrics = {"theory/z/v_aug": 0.2 + slope * (0.5 - alpha), "forecast/alpha_mis": 0.49}
            yield from seeded([f"loss={loss}", "loss.temperature=0.1", f"alpha={alpha}"], metrics)


def test_low_alpha() -> None:
    assert list(outcomes("low_alpha", low(1.0, 0.1)).values()) == [HOLDS, HOLDS]
    assert list(outcomes("low_alpha", low(1.0, 1.1)).values()) == [HOLDS, FAILS]
    assert list(outcomes("low_alpha", low(-1.0, 0.1)).values()) == [FAILS, FAILS]


def longer(slack: float, other: float) -> Made:
    for number, epochs in enumerate((5, 10, 20, 50)):
        metrics = {NCC: 0.5 + number / 10, "theory/bound/slack": 1 + slack * number}
        metrics["theory/bound/class_excluded_slack"] = 1 + other * number
        yield from seeded([f"pretrain.epochs={epochs}"], metrics)


def test_training_length() -> None:
    assert list(outcomes("training_length", longer(0.1, -0.05)).values()) == [HOLDS, HOLDS]
    assert list(outcomes("training_length", longer(0.1, 0.05)).values()) == [HOLDS, FAILS]
    assert list(outcomes("training_length", longer(-0.1, 0.05)).values()) == [FAILS, FAILS]


def suppressed(threshold: Callable[[float], float]) -> Made:
    for alpha in (0.3, 0.4, 0.5, 0.6):
        metrics = {NCC: 0.9, f"texture/{NCC}": 0.9 if alpha < 0.45 else 0.2}
        yield from seeded([f"alpha={alpha}"], {**metrics, "pretrain/admission/r_star": threshold(alpha)})


def test_suppression() -> None:
    assert list(outcomes("suppression", suppressed(lambda a: a)).values()) == [UNDECIDED, HOLDS]
    assert list(outcomes("suppression", suppressed(lambda a: 1 - a)).values()) == [UNDECIDED, FAILS]
    assert list(outcomes("suppression", suppressed(lambda a: 0.5)).values()) == [UNDECIDED, FAILS]


@pytest.mark.parametrize(
    ("name", "base", "other", "same"),
    [
        ("oracle", "loss=balanced", "loss=supcon", "loss=nscl"),
        ("equal_rate", "loss.rescale=none alpha=0.3", "loss.rescale=constant_force alpha=0.3", None),
        ("loss_family", "loss=balanced alpha=0.3", "loss=decoupled alpha=0.3", "loss=infonce alpha=0.3"),
        ("schedules", "alpha=0.5 alpha_end=0.5", "alpha=0.5 alpha_end=0.7", "alpha=0.7 alpha_end=0.5"),
        ("similarity", "projector.normalize=true", "projector.normalize=false", None),
    ],
)
def test_exploratory(name: str, base: str, other: str, same: str | None) -> None:
    def made(effect: float) -> Made:
        yield from seeded(base.split(), {PROBE: 0.9})
        yield from seeded(other.split(), {PROBE: 0.9 + effect})
        yield from seeded(same.split() if same else [], {PROBE: 0.9}, SEEDS if same else ())

    different, equal = outcomes(name, made(0.03)), outcomes(name, made(0.0))
    assert sorted(different.values()) == [*([FAILS] if same else []), HOLDS], different
    assert set(equal.values()) == {FAILS}, equal
    word = other.split("=")[-1] if name == "schedules" else other.split()[0].split("=")[1]
    (claim,) = (claim for claim, outcome in different.items() if outcome == HOLDS)
    assert word in claim.split(" differs ")[0]


# What is measured for them -------------------------------------------------------------------------------------------


def test_the_difference_of_supcon_and_simclr_is_that_of_their_positives() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    z = torch.randn(120, 2, 5, generator=generator) + 2 * torch.randn(3, 5, generator=generator)[labels].unsqueeze(1)
    z = F.normalize(z + torch.randn(120, 1, 5, generator=generator), dim=2).double()
    value, error = supcon_difference(z, labels, alpha=0.4, temperature=0.2)
    by_group = []  # by hand: the means of similarities of the positives, in groups of two images
    for group in range(20):
        gaps = []
        for label in range(3):
            a, b = z[labels == label][2 * group : 2 * group + 2]
            own = (a[0] @ a[1] + b[0] @ b[1]) / 2
            gaps.append(own - (a @ b.T).mean())
        by_group.append(2 * 0.4 / 0.2 * sum(gaps) / 3)
    expected = torch.stack(by_group)
    assert value == pytest.approx(expected.mean().item(), rel=1e-9)
    assert error == pytest.approx(expected.std().item() / 20**0.5, rel=1e-9)
    assert abs(value - 4 * prototype_bias(z, labels).b2.value) < 3 * error < value


def test_a_run_has_the_bias_of_its_theory_and_its_forecast(scclr: Command, folder: Path) -> None:
    words = [*TINY, "stages=[pretrain,theory]", "theory.views=2", "theory.temperatures=[0.5]", "pretrain.knn_every=0"]
    assert scclr("train", *words, "alpha=0.4", "pretrain.epochs=20") == 0
    (run,) = judge.read(folder / "runs" / "default")
    value, error = of_run(run, {})
    scale = 2 * 0.4 / 0.5
    other = scale * run.numbers["theory/z/b2/se"]
    assert abs(value - scale * run.numbers["theory/z/b2"]) < 3 * (error**2 + other**2) ** 0.5 < value
    (found,) = JUDGES["balance_grid"].measure([run])
    assert found.numbers["supcon/difference"] == pytest.approx(value)
    theory = json.loads((run.directory / "theory.json").read_text())
    assert found.numbers["theory/repel"] == theory["bound"][0]["repel_decoupled"]["value"]
    (found,) = measure([run])
    assert 0.5 < found.numbers[H_ALONE] < 1
    assert found.numbers[H_ALONE] != run.numbers["forecast/alpha_col"]
    (run_folders(folder)[0] / "theory.json").write_text("{}")
    assert judge.main([str(run.directory.parent), "balance_grid"], folder) == 2


# The program ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_any_name_has_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for alpha in (0.3, 0.5):
        for seed in SEEDS:
            metrics = {PROBE: 0.9 + seed / 100, f"baseline/untrained/{PROBE}": 0.5}
            write_run(tmp_path / "mine", *SMALL, f"alpha={alpha}", f"seed={seed}", metrics=metrics)
    assert judge.main([str(tmp_path / "mine")], tmp_path / "results") == 0
    said = capsys.readouterr().out
    assert "| alpha | n | logreg-v1/top1, % | seconds/total, s |" in said
    assert "| 0.3 | 3 | 91.00 ± 1.00 | 56 ± 1 |" in said
    assert "baseline/untrained/logreg-v1/top1, %: 50.00 ± 0.00" in said
    rows = list(csv.DictReader((tmp_path / "results" / "mine.csv").read_text().splitlines()))
    assert [(row["alpha"], row["seed"], row[PROBE]) for row in rows[:2]] == [("0.3", "0", "0.9"), ("0.3", "1", "0.91")]
    assert rows[0]["device"] == "cpu"
    assert not list(tmp_path.glob("results/*.png"))


def test_an_experiment_has_verdicts_a_table_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (words, metrics) in enumerate(longer(0.1, -0.05)):
        close = {key: value + noise[number] for key, value in metrics.items()}
        write_run(tmp_path / "training_length-cpu", *SMALL, *words, metrics=close)
    assert judge.main([str(tmp_path / "training_length-cpu")], tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    runs = judge.read(tmp_path / "training_length-cpu")
    rho = spearmanr([run.numbers["theory/bound/slack"] for run in runs], [run.numbers[NCC] for run in runs]).statistic
    (line,) = (number for number, text in enumerate(said) if text.startswith("HOLDS      E8: the slack of T5"))
    assert f"rho = {rho:+.2f} [" in said[line + 1]
    rows = list(csv.DictReader((tmp_path / "training_length-cpu.csv").read_text().splitlines()))
    assert {row["pretrain.epochs"] for row in rows} == {"5", "10", "20", "50"}
    assert (tmp_path / "training_length-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name, one in JUDGES.items() if one.draw is not None])
def test_every_figure_is_drawn(name: str) -> None:
    made = {
        "balance_grid": lambda: grid(lambda a: 0.6 - a / 2, lambda a: a), "collapse": lambda: thresholds(0.6, 0.9, 0.9),
        "classes": lambda: many_classes({"[4,6]": 0.5, "null": 0.5}, {"null": 0.5}),
        "long_tail": lambda: tails((0.5, 0.5, 0.6), 0.001), "bias_ladder": lambda: ladder(0.1, 0.0),
        "training_length": lambda: longer(0.1, 0.0), "suppression": lambda: suppressed(lambda a: a),
    }  # fmt: skip
    draw = JUDGES[name].draw
    assert draw is not None
    figure = draw(made_of(made[name]()))
    assert all(axis.lines for axis in figure.axes)


def test_every_prediction_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(["--list"]) == 0
    said = capsys.readouterr().out
    for name, one in JUDGES.items():
        assert f"{name}\n    scclr train -m experiment={name}" in said or name == "collapse"
        assert "Criterion" in str(one.rule.__doc__)
        assert (Path(__file__).parents[1] / "conf" / "experiment" / f"{name}.yaml").exists()


def no_runs(folder: Path) -> list[str]:
    return [str(folder / "nowhere")]


def one_seed(folder: Path) -> list[str]:
    for words, metrics in longer(0.1, 0.1):
        if words[-1] == "seed=0":
            write_run(folder / "training_length", *SMALL, *words, metrics=metrics)
    return [str(folder / "training_length")]


def no_metric(folder: Path) -> list[str]:
    for words, _ in longer(0.1, 0.1):
        write_run(folder / "training_length", *SMALL, *words, metrics={PROBE: 0.9})
    return [str(folder / "training_length")]


def other_schema(folder: Path) -> list[str]:
    run = write_run(folder / "old", *SMALL, metrics={PROBE: 0.9})
    result = json.loads((run / "result.json").read_text())
    del result["config"]["loss"]
    (run / "result.json").write_text(json.dumps(result))
    return [str(folder / "old")]


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_reads_what_its_experiment_varies(name: str) -> None:
    preset = yaml.safe_load((Path(__file__).parents[1] / "conf" / "experiment" / f"{name}.yaml").read_text())
    varied = {key.split("@")[0] for key in preset["hydra"]["sweeper"]["params"]} - {"seed"}
    beginnings = judge.groups(JUDGES[name])
    assert {key for key in varied if key not in JUDGES[name].axes and not key.startswith(beginnings)} == set()


def other_axes(folder: Path) -> list[str]:
    for width in (8, 16):
        write_run(folder / "oracle", f"encoder.widths=[{width},16]", metrics={PROBE: 0.9})
    return [str(folder / "oracle")]


def other_name(folder: Path) -> list[str]:
    return [str(folder), "balance_gird"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_runs, "no runs; give a folder of runs"),
        (one_seed, "one seed only (0): no verdict without more; add seed=0,1,2"),
        (no_metric, "12 of 12 runs have no theory/bound/slack"),
        (other_schema, "no finished run that this version reads"),
        (other_axes, "the runs differ in encoder.widths: this experiment varies loss"),
        (other_name, "balance_gird: no such experiment; did you mean balance_grid?"),
        (lambda folder: [], "give a folder of runs, such as"),
    ],
)
def test_what_cannot_be_judged(
    make: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge.main(make(tmp_path), tmp_path / "results") == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert message in last
    assert said.out == ""
    assert len([line for line in said.err.splitlines() if not line.startswith("left out: ")]) == 1
    assert not (tmp_path / "results").exists()

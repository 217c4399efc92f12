"""``scclr evaluate``: the numbers of the stage ``probe``, kept in the folder of the run that they are about."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, result_of

import scclr
from scclr.api.evaluate import evaluate
from scclr.config.errors import UserError

WORDS = ["stages=[pretrain]", *TINY]  # of the fixture ``run``, which was not evaluated, on 300 of the digits
GREY = ["dataset=arrays", "dataset.root=images.npz", "dataset.mean=[0.5]", "dataset.std=[0.25]"]


def write_images(folder: Path) -> None:
    """Three classes of noise of different brightness."""
    labels = np.arange(120) % 3
    noise = np.random.default_rng(0).integers(0, 160, (120, 8, 8))
    np.savez(folder / "images.npz", images=(noise + 40 * labels[:, None, None]).astype(np.uint8), labels=labels)


def kept(run: "scclr.api.Run") -> list[str]:
    return sorted(path.name for path in (run.directory / "evaluations").glob("*"))


def test_the_numbers_are_those_of_the_stage_probe(
    run: "scclr.api.Run", scclr: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert scclr("evaluate", str(run.directory), "protocols=[knn,logreg]", *TINY[-2:]) == 0
    shown = capsys.readouterr().out
    words = ["stages=[probe]", f"init_from={run.directory}", "dataset.limit=300", "protocol=[knn,logreg]", *TINY[-2:]]
    expected = __import__("scclr").train(*words).result
    assert len(run.evaluations) == 2
    for protocol in ("knn-v1", "logreg-v1"):
        (found,) = (one for one in run.evaluations.values() if one["protocol"] == protocol)
        wanted = {name: value for name, value in expected["metrics"].items() if protocol in name.split("/")}
        assert found["metrics"] == wanted
        assert {f"baseline/pixels/{protocol}/top1", f"baseline/untrained/{protocol}/top1"} < {*wanted}
        chosen = {name: value for name, value in expected["chosen"].items() if protocol in name}
        assert (found["chosen"], found["dataset"]) == (chosen, "digits")
        assert found["validation"] == {k: v for k, v in expected["validation"].items() if protocol in k}
        assert found["encoder_sha256"] == expected["encoder_sha256"]
        assert [*found["config"]["probe"]["protocols"]] == [protocol[:-3]]
        assert found["seconds"]["total"] > 0
        assert {"machine", "versions"} < {*found}
        assert f"{100 * wanted[f'{protocol}/top1']:.2f}" in shown
    stem = next(stem for stem in run.evaluations if "-knn-" in stem)
    arrays = np.load(run.directory / "evaluations" / f"{stem}.npz")
    assert np.trace(arrays["knn-v1"]) / arrays["knn-v1"].sum() == expected["metrics"]["knn-v1/top1"]
    assert result_of(run.directory) == run.result


def test_only_what_is_missing_is_computed(
    run: "scclr.api.Run", monkeypatch: pytest.MonkeyPatch, scclr: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    evaluate(run, ["protocols=[knn]"])
    before, computed = kept(run), []
    from scclr.api import evaluate as module

    whole = module.evaluate_by

    def counted(*args: object) -> dict:
        computed.append([*args[3]])  # type: ignore[call-overload]
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "evaluate_by", counted)
    for _ in range(2):
        assert scclr("evaluate", str(run.directory), "protocols=[knn,ncc]") == 0
    first, second = capsys.readouterr().out.split("\ntest split, %")[1:]
    assert first.split("\n")[1:4] == second.split("\n")[1:4]
    assert computed == [["ncc"]]
    assert {*before} < {*kept(run)}
    random = torch.get_rng_state()
    evaluate(run, ["protocols=[knn]", "overwrite=true"])
    assert torch.equal(torch.get_rng_state(), random)
    assert computed == [["ncc"], ["knn"]]
    assert len(run.evaluations) == 2
    monkeypatch.setattr("scclr.evaluate.knn.Knn.version", 99)
    assert "knn-v99/top1" in evaluate(run, ["protocols=[knn]"])[0]["metrics"]
    assert len(run.evaluations) == 3


def test_other_data_and_options(run: "scclr.api.Run", folder: Path) -> None:
    write_images(folder)
    (other,) = evaluate(run, ["protocols=[knn]", *GREY])
    assert (other["dataset"], other["config"]["dataset"]["root"]) == ("arrays", "images.npz")
    (fewer,) = evaluate(run, ["protocols=[knn]", "dataset.limit=200"])
    assert fewer["config"]["dataset"] == {**run.config.dataset, "limit": 200}
    evaluate(run, ["protocols=[knn]"])
    (near,) = evaluate(run, ["protocols=[knn]", "probe.protocols.knn.k=[1]", "probe.layers=[z]"])
    assert near["config"]["dataset"] == run.config.dataset
    assert near["chosen"]["z/knn-v1"]["k"] == 1
    assert len(run.evaluations) == 4
    assert near["config"]["init_from"] == str(run.directory)
    assert asdict(run.config)["stages"] == ["pretrain"]


@pytest.mark.slow
def test_results_have_the_columns_of_all_seeds(run: "scclr.api.Run", folder: Path) -> None:
    write_images(folder)
    second = scclr.train("stages=[pretrain]", "seed=1", *TINY)
    plain = [evaluate(one, ["protocols=[ncc,knn]", *GREY]) for one in (run, second)]
    rows = scclr.results("runs")
    assert [row["seed"] for row in rows] == [0, 1]
    for row, (ncc, knn) in zip(rows, plain, strict=True):
        assert row["arrays/ncc-v1/top1"] == ncc["metrics"]["ncc-v1/top1"]
        assert row["arrays/baseline/pixels/knn-v1/top1"] == knn["metrics"]["baseline/pixels/knn-v1/top1"]
    (other,) = evaluate(second, ["protocols=[knn]", "probe.protocols.knn.k=[1]", *GREY])
    rows = scclr.results("runs")
    names = [sorted(name for name in row if name.endswith("/knn-v1/top1") and "baseline" not in name) for row in rows]
    assert len(names[0]) == 1
    assert len(names[1]) == 2, "the options are told apart"
    assert names[0][0] in names[1]
    assert {rows[1][name] for name in names[1]} == {one["metrics"]["knn-v1/top1"] for one in (plain[1][1], other)}
    assert "arrays/ncc-v1/top1" in rows[0], "of which there is one"


def test_a_run_that_begins_anew_loses_its_evaluations(run: "scclr.api.Run") -> None:
    evaluate(run, ["protocols=[ncc]"])
    assert len(kept(run)) == 2
    again = scclr.train("stages=[pretrain]", "overwrite=true", *TINY)
    assert again.directory.resolve() == run.directory.resolve()
    assert again.evaluations == {}


@pytest.mark.slow
def test_weights_from_elsewhere_are_evaluated(run: "scclr.api.Run", folder: Path) -> None:
    torch.save(run.model.encoder.state_dict(), folder / "weights.pth")
    words = ["init_from=weights.pth", "init_mean=[0.3053]", "init_std=[0.376]", *TINY[:2], "protocol=[ncc]"]
    foreign = scclr.train("stages=[probe]", *words)
    (found,) = evaluate(foreign, ["protocols=[ncc]"])
    assert found["metrics"].items() <= foreign.metrics.items()
    assert found["metrics"]["ncc-v1/top1"] == evaluate(run, ["protocols=[ncc]"])[0]["metrics"]["ncc-v1/top1"]


@pytest.mark.slow
def test_a_run_that_evaluates_another_is_evaluated(run: "scclr.api.Run") -> None:
    probed = scclr.train("stages=[probe]", f"init_from={run.directory}", "dataset.limit=300", "protocol=[knn]")
    (found,) = evaluate(probed, ["protocols=[knn]"])
    assert found["metrics"].items() <= probed.metrics.items()
    assert probed.evaluations.keys() == {path.stem for path in (probed.directory / "evaluations").glob("*.json")}


@pytest.mark.slow
def test_two_processes_find_the_same(run: "scclr.api.Run") -> None:
    (alone,) = evaluate(run, ["protocols=[logreg]"])
    (both,) = evaluate(run, ["protocols=[logreg]", "nproc=2", "overwrite=true"])
    top1 = {name: value for name, value in alone["metrics"].items() if name.endswith("top1")}
    assert {name: both["metrics"][name] for name in top1} == pytest.approx(top1, abs=0.01)
    assert len(kept(run)) == 2


def test_a_damaged_record_is_named(run: "scclr.api.Run") -> None:
    evaluate(run, ["protocols=[ncc]"])
    (path,) = (run.directory / "evaluations").glob("*.json")
    path.write_text(json.dumps({"metrics": {"ncc-v1/top1": "high"}}))
    for look in (lambda: run.evaluations, lambda: scclr.results("runs")):
        with pytest.raises(UserError, match="damaged; delete it and evaluate again"):
            look()


def test_mistakes_are_one_line_and_leave_nothing(
    run: "scclr.api.Run", folder: Path, scclr: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    name, before = str(run.directory), sorted(folder.rglob("*"))
    for words, message in [
        ([], "type scclr evaluate <run>"),
        (["protocols=[knn]"], "type scclr evaluate <run>"),
        ([f"{name}x"], f"did you mean {name}?"),
        ([name, "protocols=[kn]"], "did you mean knn?"),
        ([name, "protcols=[knn]"], "does not read protcols; did you mean protocols?"),
        ([name, "alpha=0.3"], "scclr evaluate does not read alpha; it reads protocols, probe, dataset"),
        ([name, "stages=[probe]"], "does not read stages"),
        ([name, "probe.dataset=mnist"], "type dataset=mnist"),
        ([name, "probe.protocols.sgd.epochs=3"], "sgd is not chosen"),
        ([name, "dataset.limt=9"], "did you mean limit?"),
        ([name, "dataset=fashion"], "did you mean fashion_mnist?"),
        ([name, "dataset=cifar10", "dataset.root=nowhere"], "nowhere"),
        ([name, "-m", "protocols=[knn],[ncc]"], "--multirun: no flag of this command"),
        ([name, "seed=1"], "does not read seed"),
        ([name, "device=tpu"], "device=tpu: choose one of auto, cpu, cuda"),
        ([name, "word"], "write key=value"),
    ]:
        assert scclr("evaluate", *words) == 1
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "export", "embed"])
def test_every_command_has_help(scclr: Callable[..., int], capsys: pytest.CaptureFixture, command: str) -> None:
    assert scclr(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: scclr {command} <run>")
    assert scclr("--help") == 0
    assert f"  {command} " in capsys.readouterr().out

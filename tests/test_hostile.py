"""Hostile command lines, checkpoints and run folders, made by rule: what is wrong with them is said in one line."""

import io
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import state
from conftest import TINY, compose, run_folders, training

from scclr.cli import dispatch
from scclr.config.errors import UserError
from scclr.config.resolve import refuse_other
from scclr.config.schema import COMPONENTS, refuse_unusable
from scclr.pretrain.state import TrainState
from scclr.run.checkpoint import FORMAT, load, resume, save, saved_config
from scclr.run.files import GENERATIONS
from scclr.run.result import TITLES, read_result, summary, validation_accuracy

Run = Callable[..., int]
Answer = Callable[..., tuple[int, str]]
VALUES = (
    "0.5",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e30",
    "",
    "text",
    "[1,a]",
    "[nan]",
    "{a: 1}",
    "null",
    "true",
    "9" * 20,
)
BASES = (  # so that every loss, optimizer, augmentation and kind of dataset has its turn
    "",
    "loss=hard_negative optimizer=lars augment=simclr dataset=cifar10_lt dataset.root=.",
    "loss=sigmoid optimizer=sgd encoder=resnet18 augment=byol",
    "loss=prototype dataset=imagefolder dataset.root=. dataset.image_size=32",
    "loss=debiased alpha_schedule=linear alpha_end=0.7",
    "loss=align_uniform stages=[pretrain,probe,theory]",
)
ONE_STEP = [*TINY, "pretrain.epochs=1", "pretrain.batch_size=255", "pretrain.knn_every=0", "stages=[pretrain]"]
SHORT = [*TINY, "stages=[pretrain]"]
SECONDS = 30  # for one line


def dotted(node: object, prefix: str = "") -> Iterator[str]:
    """Every key below a mapping, as on a command line."""
    for name, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{name}"
        yield from dotted(value, f"{prefix}{name}.")


def places(folder: Path) -> set[Path]:
    """All that a command can leave behind, but for what it writes into folders of runs that are there already."""
    return {path for path in (*folder.iterdir(), *folder.glob("runs*/*"), *folder.glob("runs*/*/*")) if path.is_dir()}


def hostile_lines() -> list[list[str]]:
    """Every key of the composed configurations with every value, in an order that is always the same."""
    lines, known = [], set()
    for base in BASES:
        keys = [key for key in dotted(asdict(compose(*base.split()))) if key not in known or key.startswith("loss.")]
        lines += [[*base.split(), f"{key}={value}"] for key in keys for value in VALUES]
        known |= {*keys}
    random.Random(0).shuffle(lines)
    return lines


@pytest.fixture
def answer(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Answer]:
    """``answer(*words)`` gives (exit code, what is wrong with how the command line was answered, if anything is)."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    older = signal.signal(signal.SIGALRM, too_long)

    def run(*words: str) -> tuple[int, str]:
        before = places(folder)
        capsys.readouterr()
        signal.alarm(SECONDS)
        try:
            code = scclr(*words)
        finally:
            signal.alarm(0)
        said = capsys.readouterr().err
        faults = [
            "a traceback" * ("Traceback" in said),
            "no advice" * (code != 0 and f"scclr {words[0]}: error: " not in said.splitlines()[-1:][0]),
            f"exit code {code}" * (code not in (0, 1, 2)),
            f"{said.count(os.linesep)} lines" * (code != 0 and said.count(os.linesep) > 3),
        ]
        faults.append("something was left" * (code != 0 and places(folder) != before))
        wrong = ", ".join(fault for fault in faults if fault)
        return code, f"{' '.join(words)}: {wrong}; {said[-300:]}" if wrong else ""

    yield run
    signal.signal(signal.SIGALRM, older)


# Command lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, pytest.param(150, marks=pytest.mark.slow)])
def test_a_hostile_command_line_is_refused_in_one_line_or_trains(
    count: int, answer: Answer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is checked as before a training; some of those that pass are trained for a step."""
    checked = hostile_lines()[-count:]
    with monkeypatch.context() as stub:
        stub.setattr(import_module("scclr.train"), "run", lambda *_: None)
        answers = [(words, *answer("train", *words)) for words in checked]
    assert [wrong for _, _, wrong in answers if wrong] == []
    accepted = [words for words, code, _ in answers if code == 0]
    assert count / 40 < len(accepted) < count / 2
    offline = [words for words in accepted if "dataset.root=." not in words and not words[-1].startswith("tracking")]
    for number, words in enumerate(offline[: 2 + count // 50]):
        small = [word for word in ONE_STEP if word.split("=")[0] not in [one.split("=")[0] for one in words]]
        small = small if "encoder=resnet18" not in words else [word for word in small if "widths" not in word]
        elsewhere = [] if words[-1].startswith("runs=") else [f"runs=runs{number}"]
        assert answer("train", *small, *words, *elsewhere)[1] == ""


@pytest.mark.parametrize("value", ["", "0", "2", "x", "-1", "1e3", "9" * 30])
def test_half_an_environment_of_torchrun_is_refused_in_one_line(
    value: str, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    for words in (SHORT, ["-m", "seed=0,1", *SHORT]):
        assert answer("train", *words) == (1, "")


def test_a_stray_rank_hides_no_result(
    scclr: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert scclr("train", *SHORT) == 0
    assert "next  scclr train" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], {"a": -1e30}, 2**63, "\udcff", [["\ud800"]]])
def test_a_value_that_nothing_can_use_is_refused_wherever_it_stands(value: object) -> None:
    with pytest.raises(UserError, match=r"^a\.b[^\n]*give [^\n]*$"):
        refuse_unusable({"a": {"c": 1e9, "b": value}})


# Checkpoints ----------------------------------------------------------------------------------------------------------

MISSING = object()
DAMAGE = {
    **{"missing": MISSING, "null": None, "-1": -1, "true": True, "nan": math.nan, "inf": math.inf, "1e30": 10**30},
    **{"text": "text", "[]": [], "{}": {}, "{a: 1}": {"a": 1}, "tensor": torch.tensor(math.nan), "row": torch.zeros(3)},
}
HARMLESS = {  # the form of these is as a run may write it
    ("loss", "{}"), ("scaler", "{}"), ("scaler", "{a: 1}"), ("optimizer.state", "{}"), ("format", "missing"),
    ("model.projector.1.num_batches_tracked", "missing"),
}  # fmt: skip
WHOLE = state()
KEYS = [
    *("format", "config", "model", "image_size", "step", "seconds", "loss", "optimizer", "scaler", "window"),
    *(f"model.{name}" for name in ("mean", "std", "encoder.layers.conv.weight", "projector.1.num_batches_tracked")),
    *("window.terms", "window.begin", "optimizer.state", "optimizer.param_groups"),
    *(f"config.{group}" for group in COMPONENTS),
]


def damaged(whole: dict[str, Any], keys: list[str], value: object) -> dict[str, Any]:
    """``whole`` with another value at a path of keys, or without any."""
    key, *rest = keys
    if rest:
        return {**whole, key: damaged(whole[key], rest, value)}
    return {name: old for name, old in {**whole, key: value}.items() if old is not MISSING}


def refused(call: Callable[[], None]) -> bool:
    """Whether ``call`` raises an error of one line that the user can mend. Any other error is let through."""
    try:
        call()
    except UserError as error:
        return "\n" not in str(error)
    return False


@pytest.fixture(scope="module")
def first() -> TrainState:
    """The state of a run before its first step."""
    return training(compose(*TINY))[0]


def used(folder: Path, first: TrainState) -> None:
    """Read the checkpoint of a run as a command line does: to evaluate it, and to go on from it."""
    load(folder)
    found = resume(folder)
    assert found is not None
    refuse_other(compose(*TINY), found["config"], folder)
    first.load_state_dict(found)


@pytest.mark.parametrize("key", KEYS)
def test_a_damaged_entry_of_a_checkpoint_is_refused_in_one_line(key: str, first: TrainState, tmp_path: Path) -> None:
    for name, value in DAMAGE.items():
        for generation in GENERATIONS:
            (tmp_path / generation).unlink(missing_ok=True)
        save(tmp_path, damaged(WHOLE, key.split(".", 1), value))
        if (key, name) in HARMLESS:
            used(tmp_path, first)
            continue
        assert refused(lambda: used(tmp_path, first)), f"{name} was taken"


def weights(**changes: object) -> dict[str, Any]:
    """The model of a checkpoint with other entries."""
    return {name: value for name, value in {**WHOLE["model"], **changes}.items() if value is not MISSING}


class Payload:
    """Runs code when it is unpickled by one who is not careful."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def saved_by_torch(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not options)
    return buffer.getvalue()


def test_a_file_that_is_no_checkpoint_is_told_apart(folder: Path) -> None:
    save(folder, WHOLE)
    path = folder / "last.pt"
    whole, tensors = path.read_bytes(), {"weight": torch.zeros(3)}
    for data, message in (
        (b"", "not a checkpoint of scclr"),
        (b"text", "not a checkpoint of scclr"),
        (saved_by_torch(tensors), "not a checkpoint of scclr"),
        (saved_by_torch(tensors, legacy=True), "not a checkpoint of scclr"),
        (whole[:-200], "cut short"),
        (whole[:5000] + b"x" + whole[5001:], "altered since it was written"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"^last\.pt: {message}[^\n]*$"):
            load("last.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": Payload()}, "holds more than tensors and plain values, so it is not read; give a run folder"),
        ({"format": FORMAT + 1}, "a newer scclr wrote it; type pip install --upgrade scclr"),
        ({"model": weights(mean=MISSING)}, r"not a checkpoint that scclr wrote \(its model\.mean\)"),
        ({"model": weights(std=torch.zeros(1, 1, 1, 1))}, r"not a checkpoint that scclr wrote \(its model\.std\)"),
        ({"model": weights(mean=torch.zeros(1).expand(1, 10**12, 1, 1))}, r"\(its model\)"),
        ({"model": weights(mean=torch.zeros(1, 1, 1, 1, dtype=torch.float8_e5m2))}, r"\(its model\)"),
        ({"model": weights(mean=torch.full((1, 1, 1, 1), torch.nan))}, "its weights are not finite; give a checkpoint"),
        ({"config": {**WHOLE["config"], "a": json.loads("[" * 50 + "]" * 50)}}, r"\(its config\)"),
        ({"window": {"indices": torch.zeros(3)}, "step": -1}, r"\(its step\)"),
    ],
    ids=range(9),
)
def test_a_signed_checkpoint_is_not_trusted(
    changes: dict[str, Any], message: str, answer: Answer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder, {**WHOLE, **changes})
    with pytest.raises(UserError, match=rf"^last\.pt: .*{message}[^\n]*$"):
        load("last.pt")
    for words in (["stages=[probe]"], TINY):
        assert answer("train", *words, "init_from=last.pt") == (1, "")
    assert not (folder / "hacked").exists()


def test_the_weights_of_a_crash_are_read_on_request_only(tmp_path: Path) -> None:
    spoiled = {**WHOLE["model"], "projector.0.weight": torch.full_like(WHOLE["model"]["projector.0.weight"], torch.nan)}
    save(tmp_path, {**WHOLE, "model": spoiled, "window": {"indices": torch.arange(64)}}, "crash.pt")
    with pytest.raises(UserError, match=r"crash\.pt: its weights are not finite; give a checkpoint from before"):
        load(tmp_path / "crash.pt")
    assert load(tmp_path / "crash.pt", finite=False)["window"]["indices"].sum() == 63 * 32
    (tmp_path / "crash.pt").rename(tmp_path / "last.pt")
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        resume(tmp_path)


@pytest.mark.parametrize("other", [0, FORMAT - 1, FORMAT + 1])
def test_a_run_of_another_format_is_not_set_aside(other: int, tmp_path: Path) -> None:
    shared = {key: WHOLE[key] for key in ("config", "model", "image_size")}
    save(tmp_path, {**shared, "format": other})
    if other < FORMAT:
        assert saved_config(load(tmp_path)).keys() == WHOLE["config"].keys() - {"optimizer", "pretrain"}
    with pytest.raises(UserError, match="another version of scclr left this run unfinished; type overwrite=true"):
        resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_checkpoint_with_a_hostile_configuration_is_refused_in_one_line_or_evaluated(
    count: int, answer: Answer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("scclr.train"), "run", lambda *_: None)
    choices = [(key, name) for key in dotted(WHOLE["config"]) for name in DAMAGE if name not in ("tensor", "row")]
    plain, wrong = compose(*TINY), []
    for key, name in random.Random(1).sample(choices, count):
        changed = damaged(WHOLE, ["config", *key.split(".")], DAMAGE[name])
        save(folder, changed)
        (folder / "previous.pt").unlink(missing_ok=True)
        wrong.append(answer("train", "stages=[probe]", "init_from=.")[1] and f"{key}={name}")
        refused(lambda: refuse_other(plain, load(folder)["config"], folder))
    assert [fault for fault in wrong if fault] == [], "\n".join(wrong)


# Run folders ----------------------------------------------------------------------------------------------------------

RAW = (b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"[" * 10**5, b'{"metrics": NaN}', b"\x00" * 100)


def in_place_of(path: Path, written: Iterable[bytes]) -> Iterator[str]:
    """Put each of ``written`` into a file, then a folder and a pipe in its place; yields what is there."""
    for data in written:
        path.write_bytes(data)
        yield f"{data[:80]!r}"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run that is finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        assert dispatch(["train", *SHORT]) == 0
        return Path.cwd()


@pytest.fixture
def run(finished: Path, folder: Path) -> Path:
    """The folder of that run, in a copy below the working directory."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    (found,) = run_folders(folder)
    return found


def test_a_file_that_holds_no_result_is_refused_in_one_line(answer: Answer, run: Path) -> None:
    for what in in_place_of(run / "result.json", RAW[::2]):
        for line in (["train", *SHORT], ["train", "-m", "seed=0", *SHORT], ["sweep-status", "runs/default"]):
            assert answer(*line) == (1, ""), what


RESULT: dict[str, Any] = {
    "metrics": {f"{prefix}logreg-v1/top1": 0.5 for prefix in TITLES},
    "seconds": {"pretrain": 1.0, "total": 2.0},
    "validation": {"logreg-v1": 0.5},
    "last": {"pretrain/knn": 0.5},
    "config": WHOLE["config"],
}
ACCURACY, TOTAL = ["metrics", "logreg-v1/top1"], ["seconds", "total"]
OPTIONAL = (["validation", "logreg-v1"], ["last", "pretrain/knn"])


def is_as_written(path: list[str], name: str) -> bool:
    """Whether a result with this damage has the form of what some run writes."""
    if path in (ACCURACY, TOTAL, *OPTIONAL):
        return name in ("-1", "1e30") or (name == "missing" and path != TOTAL)
    if path[0] in ("metrics", "validation", "last"):
        return name in ("{}", "{a: 1}") or (name == "missing" and path[0] != "metrics")
    return False


@pytest.mark.parametrize("name", [name for name, value in DAMAGE.items() if not isinstance(value, torch.Tensor)])
def test_a_damaged_entry_of_a_result_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    def read(result: dict[str, Any]) -> None:
        (tmp_path / "result.json").write_text(json.dumps(result))
        found = read_result(tmp_path)
        refuse_other(compose(*TINY), found["config"], tmp_path)
        summary(found, tmp_path, "")
        validation_accuracy(found)

    inner = [ACCURACY, TOTAL, *OPTIONAL, ["config", "loss"], ["config", "pretrain"]]
    for path in [*([part] for part in RESULT), *inner]:
        changed = damaged(RESULT, path, DAMAGE[name])
        assert refused(lambda changed=changed: read(changed)) is not is_as_written(path, name), path  # type: ignore[misc]


def test_a_damaged_list_of_points_is_refused_in_one_line(answer: Answer, run: Path) -> None:
    names = ("", "..", "a/b", "/etc", "\0", "a\nb", "\ud800")
    odd = [json.dumps({name: "seed=0"}).encode() for name in names]
    values = [json.dumps({run.name: value}).encode() for value in (None, 1, True, [], {}, math.nan)]
    for what in in_place_of(run.parent / "sweep.json", [*RAW, *values, *odd]):
        assert answer("sweep-status", "runs/default") == (1, ""), what
    (run / "result.json").unlink()
    for what in in_place_of(run.parent / "sweep.json", [b"{", *odd[:1]]):
        assert answer("train", "-m", "seed=0", *SHORT) == (1, ""), what


ROWS = (
    *RAW, b'{"step": "a"}\n', b'{"step": null}\n', b'{"step": -1}\n', b'{"step": NaN}\n', b'{"step": 1e999}\n',
    b'{"step": [1]}\n', b'{"step": 2, "pretrain/loss": "a"}\n', b'{"step": 2, "pretrain/loss": NaN}\n',
    b'{"step": 2, "pretrain/epoch": {"a": [1]}}\n', b'{"step": 2, "step": 4}\n', b'{"step": 4}\n{"step": 2}\n',
)  # fmt: skip


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_on_whatever_its_rows_hold(every: int, answer: Answer, run: Path) -> None:
    for what in in_place_of(run / "metrics.jsonl", ROWS[::every]):
        (run / "result.json").unlink(missing_ok=True)
        code, wrong = answer("train", *SHORT)
        assert wrong == "", what
        assert code == (1 if what in ("a folder", "a pipe") else 0), what


NAMES = ("error.txt", "views.png", "last.pt", "previous.pt", ".holder", "wandb")


@pytest.mark.parametrize(
    "name", ["config.yaml", "damaged.pt", ".lock", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)]
)
def test_a_folder_in_place_of_a_file_is_refused_in_one_line(name: str, answer: Answer, run: Path) -> None:
    (run / "result.json").unlink()
    if name == "damaged.pt":
        (run / "last.pt").write_bytes(b"cut")
    (run / name).unlink(missing_ok=True)
    (run / name / "x").mkdir(parents=True)
    for line in (["train", *SHORT], ["sweep-status", "runs/default"], ["train", "overwrite=true", *SHORT]):
        assert answer(*line)[1] == ""

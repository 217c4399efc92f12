"""The record: metrics.jsonl, and the offline W&B run read back from its file."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, run_folders
from PIL import Image
from wandb_files import history, records, run_record, values

from scclr.config.compose import parse, plan
from scclr.config.errors import UserError
from scclr.config.schema import TrackingConfig
from scclr.run import progress, wandb_environment
from scclr.run.preemption import SILENT
from scclr.run.progress import Progress
from scclr.run.tracking import Log, RunLog, check_tracking, read_rows

OFFLINE = TrackingConfig(mode="offline", project="test", entity=None)
DISABLED = TrackingConfig(mode="disabled", project="test", entity=None)
KEY = 40 * "a"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sets the variables of W&B that it is about."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)


def open_log(folder: Path, config: TrackingConfig = OFFLINE, **other: Any) -> RunLog:
    given = {"group": "its group", "job_type": "pretrain", "tags": [], "settings": {}, "start": 0}
    return RunLog(folder, config, **{**given, **other})


def write(folder: Path, start: int, rows: dict[int, float]) -> None:
    with open_log(folder, settings={"alpha": 0.5}, tags=["balanced", "digits"], start=start) as log:
        for step, value in rows.items():
            log.row(step, {"loss": value, "epoch": step / 10})
        log.summary({"logreg-v1/top1": 0.9})


def test_rows_are_flushed_at_once(tmp_path: Path) -> None:
    with open_log(tmp_path, DISABLED) as log:
        log.row(10, {"loss": 1.5})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 10, "pretrain/loss": 1.5}]


def test_the_log_of_other_processes_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has every method of the log of the main process, and none of them leaves a trace."""
    monkeypatch.chdir(tmp_path)
    public = {name for name in vars(RunLog) if not name.startswith("_")}
    assert public == {name for name in vars(Log) if not name.startswith("_")}
    with Log() as log:
        log.progress(0, 10, 1)
        log.row(1, {"loss": 1.0})
        log.text("a.txt", "a")
        log.json("a.json", {})
        log.picture("views", lambda: Image.new("RGB", (4, 4)))
        log.say("a")
        log.show("a")
        log.summary({})
        log.end_progress()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_offline_run_is_whole(tmp_path: Path) -> None:
    write(tmp_path, 0, {10: 3.0, 20: 2.0})
    rows = history(tmp_path)
    assert [(row["_step"], row["pretrain/loss"]) for row in rows] == [(10, 3.0), (20, 2.0)]
    run = run_record(tmp_path)
    assert (run.display_name, run.run_group, run.project) == (tmp_path.name, "its group", "test")
    assert (run.job_type, list(run.tags)) == ("pretrain", ["balanced", "digits"])
    assert values(run.config.update)["alpha"] == 0.5
    summary = {key: value for record in records(tmp_path, "summary") for key, value in values(record.update).items()}
    assert summary["logreg-v1/top1"] == 0.9


def test_every_chart_is_drawn_over_the_training_step(tmp_path: Path) -> None:
    write(tmp_path, 0, {10: 3.0, 20: 2.0})
    metrics = {metric.name or metric.glob_name: metric for metric in records(tmp_path, "metric")}
    assert metrics["*"].step_metric == "step"
    assert metrics["step"].options.hidden
    assert [row["step"] for row in history(tmp_path)] == [10, 20]


def test_final_numbers_are_a_chart_too_at_the_last_step(tmp_path: Path) -> None:
    for name in ("pretrain", "evaluate"):
        (tmp_path / name).mkdir()
    write(tmp_path / "pretrain", 0, {10: 3.0, 20: 2.0})
    first, last = history(tmp_path / "pretrain")
    assert "logreg-v1/top1" not in first
    assert (last["step"], last["pretrain/loss"], last["logreg-v1/top1"]) == (20, 2.0, 0.9)
    write(tmp_path / "evaluate", 0, {})
    (row,) = history(tmp_path / "evaluate")
    assert (row["step"], row["logreg-v1/top1"]) == (0, 0.9)
    write(tmp_path / "pretrain", 20, {})  # the earlier attempt ended between its last step and its evaluation
    assert [row.get("logreg-v1/top1") for row in history(tmp_path / "pretrain")] == [None, 0.9]


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    write(tmp_path, 0, {10: 3.0, 20: 2.0, 30: 9.0})
    first = (tmp_path / "wandb" / "run-id").read_text()
    write(tmp_path, 20, {30: 1.0})  # the checkpoint held 20 steps
    assert [row["pretrain/loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [3.0, 2.0, 1.0]
    assert [(row["_step"], row["pretrain/loss"]) for row in history(tmp_path)] == [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert (tmp_path / "wandb" / "run-id").read_text() == first
    write(tmp_path, 0, {10: 5.0})
    assert [row["pretrain/loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [5.0]
    assert (tmp_path / "wandb" / "run-id").read_text() != first
    assert [row["pretrain/loss"] for row in history(tmp_path)] == [5.0], "of a run begun anew nothing older is left"


@pytest.mark.parametrize("line", [b'{"step": 2, "x"', b"\xff", b"[]", b"{}"])
def test_rows_are_read_up_to_a_damaged_line(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 2}\n' + line)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 2}]


def test_online_without_a_key_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = TrackingConfig("online", "test", None)
    for refused in (lambda: check_tracking(online), lambda: open_log(tmp_path, online)):
        with pytest.raises(UserError, match=r"type tracking\.mode=offline"):
            refused()


def test_a_run_is_tracked_offline(scclr: Callable[..., int], folder: Path) -> None:
    assert scclr("train", "tracking.mode=offline", "name=mine", *TINY) == 0
    (run,) = run_folders(folder)
    rows = history(run)
    assert [row["_step"] for row in rows] == [2, 3, 4, 6]
    assert {"pretrain/attract", "pretrain/repel", "pretrain/loss"} <= set(rows[0])
    assert "logreg-v1/top1" in rows[-1]
    assert run_record(run).job_type == "pretrain"
    assert list(run_record(run).tags) == ["balanced", "digits", "mine"]
    assert scclr("train", "tracking.mode=offline", "stages=[probe]", f"init_from={run}", "name=again", *TINY[-2:]) == 0
    (again,) = (path for path in run_folders(folder) if path.parent.name == "again")
    assert run_record(again).job_type == "evaluate"


def test_a_picture_travels_with_the_first_row(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.picture("views", lambda: Image.new("RGB", (4, 4)))
        log.row(10, {"loss": 1.5})
    (row,) = history(tmp_path)
    assert row["pretrain/loss"] == 1.5
    assert row["views/_type"] == "image-file"
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (4, 4)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/views*.png"))) == 1


# The environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "words", "expected"),
    [
        ({}, [], ("offline", "scclr", None, None)),
        ({"WANDB_MODE": "online"}, [], ("online", "scclr", None, None)),
        ({"WANDB_MODE": "online"}, ["tracking.mode=disabled"], ("disabled", "scclr", None, None)),
        ({"WANDB_MODE": "dryrun"}, [], ("offline", "scclr", None, None)),
        ({"WANDB_MODE": "run"}, [], ("online", "scclr", None, None)),
        ({"WANDB_MODE": ""}, [], ("offline", "scclr", None, None)),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, [], ("disabled", "scclr", None, None)),
        ({"WANDB_DISABLED": "false"}, [], ("offline", "scclr", None, None)),
        ({"WANDB_DISABLED": "true"}, ["tracking.mode=offline"], ("offline", "scclr", None, None)),
        (
            {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_DIR": "d"},
            ["tracking.project=q"],
            ("offline", "q", "e", "d"),
        ),
    ],
)
def test_the_command_line_counts_more_than_the_environment(
    variables: dict[str, str], words: list[str], expected: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (point,) = plan(parse(words)).points
    tracking = point.config.tracking
    assert (tracking.mode, tracking.project, tracking.entity, tracking.dir) == expected


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        (
            {"WANDB_MODE": "onlin"},
            {},
            "^WANDB_MODE=onlin: choose one of offline, online, disabled; did you mean online",
        ),
        ({"WANDB_MODE": "shared"}, {}, "^WANDB_MODE=shared: choose one of"),
        ({}, {"mode": "onlin"}, r"^tracking\.mode=onlin: choose one of"),
        ({}, {"project": ""}, r"^tracking\.project is empty"),
        ({}, {"entity": ""}, r"^tracking\.entity is empty"),
        ({"WANDB_PROJECT": "me/it"}, {}, r"^WANDB_PROJECT=me/it: .*type WANDB_PROJECT=me-it$"),
        *(({}, {"project": f"a{c}b"}, r"^tracking\.project=a.b: .*type tracking\.project=a-b$") for c in "/\\#?%:"),
        ({}, {"project": 129 * "a"}, "at most 128 characters.*project=a{128}$"),
    ],
)
def test_a_wrong_value_is_refused_where_it_was_given(
    variables: dict[str, str], words: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        TrackingConfig(**{"mode": None, "project": None, "entity": None, **words})


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("WANDB_BASE_URL", "notaurl", "WANDB_BASE_URL=notaurl"),
        ("WANDB_INIT_TIMEOUT", "soon", "WANDB_INIT_TIMEOUT=soon"),
        ("WANDB_API_KEY", " secret", "WANDB_API_KEY"),
    ],
)
def test_a_variable_that_wandb_refuses_is_named(
    name: str, value: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{shown}: W&B refuses this value \(.+\); correct it, or type unset {name}$"):
        check_tracking(OFFLINE)
    check_tracking(DISABLED)


def test_variables_about_how_a_run_is_shown_have_an_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"NAME": "mine", "RUN_GROUP": "ours", "JOB_TYPE": "debug", "NOTES": "a try", "TAGS": f"x, y,,{65 * 'z'}"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    check_tracking(OFFLINE)
    write(tmp_path, 0, {10: 1.0})
    run = run_record(tmp_path)
    assert (run.display_name, run.run_group, run.job_type, run.notes) == ("mine", "ours", "debug", "a try")
    assert list(run.tags) == ["balanced", "digits", "x", "y", 64 * "z"]


def test_variables_that_would_make_it_another_run_have_none_and_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb_environment.say_ignored.cache_clear()
    ignored = {"RUN_ID": "other", "RESUME": "must", "RESUME_FROM": "other?_step=30", "SWEEP_ID": "a-sweep"}
    for name, value in {**ignored, "MODE": "bogus", "TAGS": "", "BASE_URL": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    before = dict(os.environ)
    for _ in range(2):
        check_tracking(OFFLINE)
    write(tmp_path, 0, {10: 1.0})
    assert run_record(tmp_path).run_id == (tmp_path / "wandb" / "run-id").read_text()
    assert [row["_step"] for row in history(tmp_path)] == [10]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WANDB_RUN_ID, WANDB_RESUME, WANDB_RESUME_FROM, WANDB_SWEEP_ID: no effect")
    assert {**os.environ, "WANDB_SERVICE": ""} == {**before, "WANDB_SERVICE": ""}


def test_wandbs_files_may_lie_elsewhere(tmp_path: Path) -> None:
    elsewhere = TrackingConfig("offline", "test", None, str(tmp_path / "else" / "where"))
    check_tracking(elsewhere)
    for start in (0, 10):  # a resumed run is one run there too, and leaves the others alone
        for run in ("a", "b"):
            (tmp_path / run).mkdir(exist_ok=True)
            with open_log(tmp_path / run, elsewhere, start=start) as log:
                log.row(start + 10, {"loss": 1.0, "epoch": 1.0})
    found = [path.name.rsplit("-", 1)[1] for path in (tmp_path / "else" / "where" / "wandb").glob("offline-run-*")]
    assert sorted(found) == sorted((tmp_path / run / "wandb" / "run-id").read_text() for run in ("a", "b"))
    assert list(tmp_path.glob("[ab]/wandb/offline-run-*")) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = TrackingConfig("offline", "test", None, str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"file/below: W&B's files cannot be written there .*type tracking\.dir="):
        check_tracking(config)


# Online ---------------------------------------------------------------------------------------------------------------


def refuse_connections() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_refused_before_anything_is_written(
    silent_server: str, scclr: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(wandb_environment, "CONNECT_SECONDS", 0.3)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for url in (silent_server, refuse_connections()):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert scclr("train", "tracking.mode=online", *TINY) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{url} cannot be reached" in line
        assert "tracking.mode=offline" in line
    assert list(folder.iterdir()) == []


def test_resolving_a_name_takes_no_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stuck.wait(10) and [])
    monkeypatch.setattr(wandb_environment, "CONNECT_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.3 s"):
        wandb_environment.require_server("https://w.example", ())
    stuck.set()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK", b"HTTP/1.0 404 Not Found", b"HTTP/1.0 500 Oh"])
def test_any_answer_of_a_server_will_do(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer + b"\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        wandb_environment.require_server(f"http://127.0.0.1:{server.getsockname()[1]}", ())
        thread.join()


# The terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [{}, {"HOME": ""}, {"HOME": "/proc/1/nowhere"}, {"XDG_CACHE_HOME": "/proc"}])
def test_wandbs_service_prints_nothing_without_a_home_folder(home: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from scclr.config.schema import TrackingConfig; from scclr.run import tracking\n"
        "with tracking.RunLog(Path.cwd(), TrackingConfig('offline', 'p', None), group='g', job_type='j', tags=[],"
        "settings={}, start=0) as log: log.row(1, {'loss': 1.0})"
    )
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME", "WANDB_SERVICE")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment, **home}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [row["pretrain/loss"] for row in history(tmp_path)] == [1.0]


METRICS = {"epoch": 12.5, "loss": 4.2178, "attract": -0.812, "repel": 5.03, "knn": 0.912, "lr": 1e-3}
METRICS = {f"pretrain/{key}": value for key, value in {**METRICS, "images_per_second": 1234.0}.items()}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, columns: int, stream: io.StringIO) -> str:
    """What stands on the line of the terminal in the middle of a training."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 24))
    shown = Progress(0, 800, 100, lambda line: print(line, file=sys.stderr))
    shown.bar.mininterval = 0
    shown.show(100, METRICS)
    shown.close()
    return stream.getvalue().rstrip("\n").rsplit("\r", 1)[-1].rstrip()


@pytest.mark.parametrize(
    ("columns", "seen", "unseen"),
    [
        (25, ["epoch 12.5/100"], ["loss", "|"]),
        (40, [" 12%", "epoch 12.5/100", "loss 4.22 A -0.812"], ["R", "|", "<"]),
        (80, ["pretrain", "<", "loss 4.22 A -0.812 R 5.03"], ["|", "img/s"]),
        (200, ["pretrain  12% |", "<", "kNN 0.912 lr 0.001 img/s 1,234"], []),
    ],
)
def test_figures_are_whole_and_worth_more_than_the_bar(
    columns: int, seen: list[str], unseen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = drawn(monkeypatch, columns, Terminal())
    assert len(line) <= columns
    assert all(part in line for part in seen), line
    assert not any(part in line for part in unseen), line
    assert (
        line.split(", ", 1)[1]
        in (  # no figure is cut
            "epoch 12.5/100 loss 4.22 A -0.812 R 5.03 kNN 0.912 lr 0.001 img/s 1,234"[:end]
            for end in (14, 24, 33, 40, 50, 59, 71)
        )
    )


def test_a_notebook_has_a_bar_and_a_file_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    line = drawn(monkeypatch, 80, io.StringIO())
    assert line == "pretrain  12% epoch 12.5/100 loss 4.22 A -0.812 R 5.03 kNN 0.912 lr 0.001 img/s 1,234"
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "<" in drawn(monkeypatch, 80, io.StringIO())


def test_a_run_beside_others_names_itself_and_draws_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alpha0.5").mkdir()
    monkeypatch.setenv(SILENT, "1")
    with open_log(tmp_path / "alpha0.5", DISABLED) as log:
        log.say("one\ntwo")
        log.say("runs/alpha0.5")
        log.progress(0, 2, 1)
        log.row(2, {"loss": 1.0, "epoch": 1.0})
    lines = ["alpha0.5: one", "alpha0.5: two", "runs/alpha0.5", "alpha0.5: pretrain 100% epoch 1/1 loss 1"]
    assert capsys.readouterr().err.splitlines() == lines
    assert drawn(monkeypatch, 80, Terminal()) == ""
    monkeypatch.setenv("RANK", "0")  # of the processes of a single run, one prints
    assert "loss" in drawn(monkeypatch, 80, Terminal())

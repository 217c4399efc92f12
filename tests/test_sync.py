"""``scclr sync`` and ``scclr report --wandb``, against a server that takes all and keeps it."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from report_runs import METRIC, write_run
from wandb_files import history, records, run_record, values

from scclr.config.schema import TrackingConfig
from scclr.run import sync, wandb_run
from scclr.run.lock import run_lock
from scclr.run.tracking import RunLog

Command = Callable[..., int]


class Handler(BaseHTTPRequestHandler):
    """As much of W&B's server as an upload needs: it grants every run that is not refused."""

    server: "Server"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        try:
            sent = json.loads(self.body())
        except ValueError:  # W&B's telemetry about itself
            sent = {}
        query, given = sent.get("query", ""), sent.get("variables", {})
        if self.path.endswith("/file_stream"):
            rows = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.rows.setdefault(self.path.split("/")[-2], []).extend(map(json.loads, rows))
            self.answer({"exitcode": None, "limits": {}})
        elif "upsertBucket" in query and given["name"] in self.server.refused:
            self.answer({"errors": [{"message": "permission denied"}]}, 403)
        elif "upsertBucket" in query:
            name, project = given["name"], {"name": given["project"], "entity": {"name": "me"}}
            self.server.runs.setdefault(name, given)
            bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": project}
            self.answer({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        elif "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in given["files"]]
            self.answer({"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}})
        elif "viewer" in query:
            self.answer({"data": {"viewer": {"id": "me", "entity": "me", "username": "me", "teams": {"edges": []}}}})
        else:
            self.answer({"data": {"serverInfo": {"features": []}}})


class Server(ThreadingHTTPServer):
    """What was sent: the arguments of each run by its id, and the rows of its history. ``refused`` are ids of runs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.refused: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    found = Server()
    monkeypatch.setenv("WANDB_BASE_URL", found.url)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def log_offline(folder: Path) -> str:
    """An offline W&B run of two rows in a run folder; returns its id."""
    folder.mkdir(parents=True)
    config = TrackingConfig("offline", "test", None)
    with RunLog(folder, config, group="g", job_type="pretrain", tags=[], settings={"alpha": 0.5}, start=0) as log:
        for step in (1, 2):
            log.row(step, {"loss": 1 / step, "epoch": 1.0})
    return (folder / "wandb" / "run-id").read_text()


def waiting(folder: Path, count: int) -> list[Path]:
    """Files of runs that are to be uploaded."""
    files = [folder / f"{i:03}" / "wandb" / f"offline-run-{i:03}" / f"run-{i:03}.wandb" for i in range(count)]
    for path in files:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"more than a header")
    return files


@pytest.mark.slow
def test_what_is_offline_is_uploaded_once(
    scclr: Command, folder: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, refused, busy = (log_offline(folder / "runs" / "mine" / name) for name in "abcd")
    (empty,) = waiting(folder / "runs" / "killed", 1)
    empty.write_bytes(b"7 bytes")
    server.refused.add(refused)
    monkeypatch.setenv("WANDB_MODE", "offline")  # which is about new runs
    with run_lock(folder / "runs" / "mine" / "d", overwrite=False):
        assert scclr("sync", "runs") == 1
    said = capsys.readouterr()
    assert said.err == f"uploading 3 W&B runs to {server.url}\n"
    total, reason = said.out.splitlines()
    assert total == "2 uploaded, 1 failed, 1 still running, 1 empty"
    assert reason.startswith("  failed  runs/mine/c/wandb/offline-run-")
    assert "permission denied" in reason
    assert set(server.runs) == {first, second}
    for run in (first, second):
        assert (server.runs[run]["project"], server.runs[run]["groupName"]) == ("test", "g")
        assert [row["pretrain/loss"] for row in server.rows[run]] == [1.0, 0.5]

    server.refused.clear()
    assert scclr("sync", "runs/mine/c", "runs/mine/d") == 0
    assert capsys.readouterr().out == "2 uploaded\n"
    assert set(server.runs) == {first, second, refused, busy}
    sent = {run: len(rows) for run, rows in server.rows.items()}
    assert scclr("sync", "runs") == 0
    assert capsys.readouterr() == ("0 uploaded, 4 uploaded before, 1 empty\n", "")
    assert {run: len(rows) for run, rows in server.rows.items()} == sent
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]


def test_errors_of_a_server_end_the_upload(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``wandb sync`` uploads 60 runs and then always fails, three of the others are tried."""
    files, calls = waiting(folder, 100), list[int]()

    def fake(paths: list[Path]) -> str:
        calls.append(len(paths))
        for path in paths:
            if path in files[:60]:
                sync._marker(path).touch()
        return "wandb: Syncing\nwandb: ERROR out of space\nwandb: ERROR Find detailed error logs at: x\n"

    monkeypatch.setattr(sync, "_wandb_sync", fake)
    monkeypatch.setattr(sync, "version", lambda _: "0.31.0")
    lines, whole = sync.upload([folder])
    assert not whole
    assert calls == [50, 50, 1, 1, 1]
    assert lines[0] == "60 uploaded, 40 failed"
    assert [line.rpartition(": ")[0].endswith("not tried") for line in lines[1:]] == [False] * 3 + [True] * 37
    assert all(line.endswith(": out of space") for line in lines[1:])


def test_an_older_version_marks_failures_too(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls = waiting(folder, 3), list[int]()

    def fake(paths: list[Path]) -> str:
        calls.append(len(paths))
        sync._marker(paths[0]).touch()
        return "wandb: ERROR denied" if paths[0] == files[1] else "Syncing: x ... done."

    monkeypatch.setattr(sync, "_wandb_sync", fake)
    monkeypatch.setattr(sync, "version", lambda _: "0.22.3")
    lines, whole = sync.upload([folder])
    assert calls == [1, 1, 1]
    assert lines == ["2 uploaded, 1 failed", f"  failed  {files[1].parent}: denied"]
    assert not whole
    assert [sync._is_uploaded(path) for path in files] == [True, False, True]


def test_what_cannot_be_uploaded_is_refused_in_one_line(
    scclr: Command, folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting(folder / "runs", 1)
    (folder / "none").mkdir()

    def refused(message: str, *words: str) -> None:
        assert scclr("sync", *words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    refused("type scclr sync <folder>")
    refused("none: no offline W&B run in it or below", "runs", "none")
    refused("--all: no flag of this command", "runs", "--all")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    refused("server at http://127.0.0.1:9 cannot be reached", "runs")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "absent"))
    refused("scclr sync: error: W&B has no key; type `wandb login`\n", "runs")


def runs(folder: Path) -> None:
    """Two balances with two seeds each, which were logged to the project ``theirs``."""
    words = ("encoder.widths=[8,16]", "tracking.project=theirs")
    for alpha in (0.3, 0.5):
        for seed in (0, 1):
            own = (f"alpha={alpha}", f"seed={seed}")
            write_run(folder, *words, *own, metrics={METRIC: 0.9 + alpha / 10 + seed * alpha / 100})


def media(row: dict[str, Any], folder: Path, name: str) -> bytes:
    """The file that a row of the offline run in ``folder`` names."""
    (files,) = folder.glob("wandb/offline-run-*/files")
    return (files / row[f"{name}/path"]).read_bytes()


def test_a_report_is_one_run_of_wandb(
    scclr: Command, folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(folder / "mine")
    assert scclr("report", "mine", "--wandb") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "logged offline; scclr sync mine/report uploads it"
    report = folder / "mine" / "report"
    run = run_record(report)
    assert (run.job_type, run.project, run.run_group) == ("report", "theirs", "mine")
    assert run.display_name == "report of mine"
    assert values(run.config.update)["metric"] == METRIC
    (row,) = history(report)
    assert row["report/_type"] == "html-file"
    assert media(row, report, "report") == (report / "report.html").read_bytes()
    assert row["figures/metric/_type"] == "image-file"
    assert media(row, report, "figures/metric") == (report / "metric.png").read_bytes()
    assert row["figures/metric/caption"].startswith("logreg-v1/top1 against alpha.")
    table = json.loads(media(row, report, "table"))
    assert table["columns"][:3] == ["alpha", METRIC, "sd"]
    assert [cells[:2] for cells in table["data"]] == [[0.3, pytest.approx(0.9315)], [0.5, pytest.approx(0.9525)]]
    assert table["data"][0][-1].endswith("alpha=0.3 'encoder.widths=[8,16]' seed=0,1")
    assert server.runs == {}

    monkeypatch.setattr("time.time", lambda: row["_step"] + 60)
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert scclr("report", "mine", "--wandb", "tracking.project=other", "--metric", "seconds/total") == 0
    (again,) = history(report)
    assert again["_step"] == row["_step"] + 60
    assert run_record(report).run_id == run.run_id
    assert (run_record(report).project, run_record(report).run_group) == ("other", "ours")
    assert len(records(report, "run")) == 1


@pytest.mark.slow
def test_a_report_is_logged_online(
    scclr: Command, folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(folder / "mine")
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb_run.teardown()  # the service knows the server of an earlier test
    assert scclr("report", "mine", "--wandb") == 1  # this server knows no artifacts, in which W&B keeps tables
    assert "mine/report/report.html is written, but W&B stopped (" in capsys.readouterr().err
    monkeypatch.setattr(wandb_run, "_table", lambda columns, rows: len(rows))
    assert scclr("report", "mine", "--wandb") == 0
    (name,) = server.runs
    assert capsys.readouterr().out.splitlines()[-1] == f"{server.url}/me/theirs/runs/{name}"
    assert server.runs[name]["jobType"] == "report"
    (row,) = server.rows[name]
    assert (row["report"]["_type"], row["table"]) == ("html-file", 2)
    server.refused.add(name)
    assert scclr("report", "mine", "--wandb") == 1
    assert "W&B does not start (" in capsys.readouterr().err
    wandb_run.teardown()


def test_a_report_that_cannot_be_logged_is_refused_before_it_is_made(
    scclr: Command, folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(folder / "mine")
    for words, message in {
        ("tracking.mode=online",): "a report is logged with --wandb; add it",
        ("--wandb", "tracking.mod=online"): "no such key of tracking; did you mean mode?",
        ("--wandb", "tracking.mode=onlin"): "tracking.mode=onlin: choose one of",
        ("--wandb", "tracking.mode=disabled"): "logs nothing: drop --wandb",
    }.items():
        assert scclr("report", "mine", *words) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert scclr("report", "mine", "--wandb", "tracking.mode=online") == 1
    assert "tracking.mode=online: W&B's server at http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert not (folder / "mine" / "report").exists()

"""The record: metrics.jsonl, and the offline W&B run read back from its file."""

import io
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, run_folders
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from scclr.config.errors import UserError
from scclr.config.schema import TrackingConfig
from scclr.run.tracking import Log, RunLog, read_rows

OFFLINE = TrackingConfig(mode="offline", project="test")


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB."""
    data = io.BytesIO(path.read_bytes())
    data.seek(7)
    parts = b""
    while header := data.read(7):
        if (start := data.tell() - len(header)) % 32768 > 32768 - 7:  # padding at the end of a block
            data.seek(start + 32768 - start % 32768)
            continue
        _, length, kind = struct.unpack("<IHB", header)
        parts += data.read(length)
        if kind in (1, 4):  # FULL, LAST
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(folder: Path) -> list[dict]:
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    rows, patience = [], time.monotonic() + 10
    while file.stat().st_size <= 7 and time.monotonic() < patience:  # W&B's service writes when it finds time
        time.sleep(0.05)
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def write(folder: Path, start: int, rows: dict[int, float]) -> None:
    settings = {"alpha": 0.5}
    with RunLog(folder, OFFLINE, name="a run", group="its group", settings=settings, start=start) as log:
        for step, value in rows.items():
            log.row(step, {"loss": value, "epoch": step / 10})
        log.summary({"probe/logreg/top1": 0.9})


def test_rows_are_flushed_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrackingConfig("disabled", "test"), name="n", group="g", settings={}, start=0) as log:
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
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group, run.project) == ("a run", "its group", "test")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["alpha"] == 0.5
    summaries = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for r in records if r.WhichOneof("record_type") == "summary" for item in r.summary.update
    }  # fmt: skip
    assert summaries["probe/logreg/top1"] == 0.9


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
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"type tracking\.mode=offline"):
        RunLog(tmp_path, TrackingConfig("online", "test"), name="n", group="g", settings={}, start=0)


def test_a_run_is_tracked_offline(scclr: Callable[..., int], folder: Path) -> None:
    assert scclr("train", "tracking.mode=offline", *TINY) == 0
    (run,) = run_folders(folder)
    rows = history(run)
    assert [row["_step"] for row in rows] == [2, 3, 4, 6]
    assert {"pretrain/attract", "pretrain/repel", "pretrain/loss"} <= set(rows[0])


def test_a_picture_travels_with_the_first_row(tmp_path: Path) -> None:
    with RunLog(tmp_path, OFFLINE, name="n", group="g", settings={}, start=0) as log:
        log.picture("views", lambda: Image.new("RGB", (4, 4)))
        log.row(10, {"loss": 1.5})
    (row,) = history(tmp_path)
    assert row["pretrain/loss"] == 1.5
    assert row["views/_type"] == "image-file"
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.size == (4, 4)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/views*.png"))) == 1

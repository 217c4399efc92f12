"""An offline W&B run read back from its file."""

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record, RunRecord


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


def records(folder: Path, kind: str) -> list[Any]:
    """The records of one kind in the offline run of a folder."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    patience = time.monotonic() + 10
    while file.stat().st_size <= 7 and time.monotonic() < patience:  # W&B's service writes when it finds time
        time.sleep(0.05)
    return [getattr(r, kind) for r in wandb_records(file) if r.WhichOneof("record_type") == kind]


def values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(folder: Path) -> list[dict[str, Any]]:
    return [values(record.item) for record in records(folder, "history")]


def run_record(folder: Path) -> RunRecord:
    (run,) = records(folder, "run")
    return run

"""Checkpoints of a run: written whole or not at all, verified when they are read, and never run as code."""

import hashlib
import io
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch

from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import checkpoint_path
from scclr.run import distributed
from scclr.run.files import GENERATIONS, require_room, storage_error, write_atomic
from scclr.run.preemption import LEAVE, CheckpointSchedule

FORMAT = 2  # of what a checkpoint holds; a run of another format cannot be resumed
MARK = b"sha256:"
COMMENT = len(MARK) + 64


class Checkpoints:
    """Where and when a run writes its checkpoints.

    Args:
        directory: the run folder.
        described: what every checkpoint holds besides the state, such as the configuration.
        seconds: what the training took up to the checkpoint that it goes on from.
    """

    def __init__(
        self, directory: Path, schedule: CheckpointSchedule, described: dict[str, Any], seconds: float = 0.0
    ) -> None:
        self.directory, self.schedule, self.described = directory, schedule, described
        self.started = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """How long the training has taken so far, without the time between two attempts."""
        return time.monotonic() - self.started

    def due(self, step: int) -> int:
        """Whether to ``SAVE`` or to ``LEAVE`` after ``step`` finished steps; false for neither, equal in all processes.

        Every process of a group must call this.
        """
        return distributed.all_reduce_max(self.schedule.due(step))

    def save(self, state: dict[str, Any], due: int) -> None:
        """Write ``last.pt``, and then stop if ``due`` is ``LEAVE``.

        Raises:
            UserError: as ``save``.
            SystemExit: a signal asked the run to stop.
        """
        self.write(state)
        if due == LEAVE:
            distributed.barrier()  # no process leaves before the checkpoint is on the disk
        self.schedule.saved(due)

    def write(self, state: dict[str, Any], name: str = GENERATIONS[0]) -> None:
        """Write a checkpoint; the main process does it."""
        if distributed.is_main():
            save(self.directory, {**state, **self.described, "seconds": self.seconds}, name)


def save(directory: Path, state: dict[str, Any], name: str = GENERATIONS[0]) -> None:
    """Write a checkpoint atomically; the one before it is kept as ``previous.pt``.

    The file is what ``torch.save`` writes, a zip archive, with the SHA-256 of everything before it as its comment.

    Raises:
        UserError: the disk is full or cannot be written; the previous checkpoint is still there.
    """
    path, buffer = directory / name, io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    data = buffer.getbuffer()
    data[-2:] = COMMENT.to_bytes(2, "little")  # an archive without a comment ends with the comment's length, 0
    comment = MARK + hashlib.sha256(data).hexdigest().encode()

    def write(file: IO[bytes]) -> None:
        file.write(data)
        file.write(comment)

    try:
        require_room(directory, len(data))
        write_atomic(path, write, keep=directory / GENERATIONS[1] if name == GENERATIONS[0] else None)
    except OSError as error:
        raise storage_error(error) or UserError(f"{path}: cannot write the checkpoint ({one_line(error)})") from error


def load(source: str | Path) -> dict[str, Any]:
    """The checkpoint of a run folder, or the file itself, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        UserError: nothing is there, the file is cut short or was altered, or it is not a checkpoint of scclr.
    """
    path = checkpoint_path(source)
    data = path.read_bytes()
    body, comment = memoryview(data)[:-COMMENT], data[-COMMENT:]
    if not comment.startswith(MARK) or not data.startswith(b"PK"):
        raise UserError(f"{path}: not a checkpoint of scclr, or cut short; give a run folder or its last.pt")
    if comment != MARK + hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path}: altered since it was written (its checksum differs); give an intact one")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def saved_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint; of another format only what its weights need, which all formats share."""
    config: dict[str, Any] = checkpoint["config"]
    if checkpoint.get("format") == FORMAT:
        return config
    return {key: value for key, value in config.items() if key not in ("optimizer", "pretrain")}


def resume(directory: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run folder, or None if there is none. All processes of a group get the same.

    A damaged checkpoint is named on standard error and set aside as ``damaged.pt``.

    Raises:
        UserError: all checkpoints are damaged, another version of scclr wrote them, or the processes do not see the
            same folder.
    """
    found = _newest_intact(directory) if distributed.is_main() else None
    distributed.barrier()  # the main process has set aside what is damaged
    if not distributed.is_main():
        found = _newest_intact(directory)
    step = -1 if found is None else found["step"]
    message = f"{directory}: not all processes see its checkpoint; type runs=<a folder that all machines share>"
    require(distributed.all_reduce_max(step) == step, message)
    return found


def _newest_intact(directory: Path) -> dict[str, Any] | None:
    damage = None
    for path in (directory / name for name in GENERATIONS):
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            damage = error
            os.replace(path, directory / "damaged.pt")
            print(f"{one_line(error)}: set aside as damaged.pt", file=sys.stderr)
            continue
        message = f"{path}: another version of scclr left this run unfinished; type overwrite=true to begin anew"
        require(state.get("format") == FORMAT, message)
        if damage is not None:
            print(f"going on from {path.name}, at step {state['step']}", file=sys.stderr)
        return state
    require(damage is None, f"{directory}: no intact checkpoint is left; type overwrite=true to begin anew")
    return None

"""Checkpoints of a run: written whole or not at all, verified when they are read, and never run as code."""

import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import checkpoint_path
from scclr.config.schema import has_parts
from scclr.run import distributed
from scclr.run.files import GENERATIONS, read_bytes, require_room, run_folder_error, write_atomic
from scclr.run.preemption import LEAVE, NOT_DUE, CheckpointSchedule

FORMAT = 2  # of what a checkpoint holds; a run of another format cannot be resumed
SHARED = ("config", "model", "image_size")  # of all formats; ``model`` has the buffers ``mean`` and ``std``
ENTRIES: dict[str, type] = {  # of this format, besides ``format``
    **{"config": dict, "model": dict, "image_size": int, "step": int, "seconds": float},
    **dict.fromkeys(("loss", "optimizer", "scaler", "window"), dict),
}
ADVICE = "give a run folder or its last.pt"
PERIOD, QUESTION_SECONDS = 8, 1.0  # the most steps between two questions to the other processes, and their time
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
        self.asked_step, self.asked, self.next = -1, self.started, 0  # about the last time that the processes asked

    @property
    def seconds(self) -> float:
        """How long the training has taken so far, without the time between two attempts."""
        return time.monotonic() - self.started

    def due(self, step: int) -> int:
        """Whether to ``SAVE`` or to ``LEAVE`` after ``step`` finished steps; false for neither, equal in all processes.

        Every process of a group must call this after every step. They ask each other where a count of steps makes a
        checkpoint due, and besides that every 8 steps, or sooner if these take longer than a second. A question makes
        the fastest process wait for the slowest.
        """
        if distributed.world_size() == 1:
            return self.schedule.due(step)
        if step < self.next and not self.schedule.counted(step):
            return NOT_DUE
        now = time.monotonic()
        each = (now - self.asked) / (step - self.asked_step if self.asked_step >= 0 else 1)  # seconds of a step
        haste = PERIOD - min(PERIOD, max(1, int(QUESTION_SECONDS / max(each, 1e-9))))
        due, haste = divmod(distributed.all_reduce_max(self.schedule.due(step) * PERIOD + haste), PERIOD)
        self.asked_step, self.asked, self.next = step, now, step + PERIOD - haste
        return due

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
        known = run_folder_error(error, directory)
        raise known or UserError(f"{path}: cannot write the checkpoint ({one_line(error)})") from error


def load(source: str | Path, *, finite: bool = True) -> dict[str, Any]:
    """The checkpoint of a run folder, or the file itself, on the CPU, with every entry that is read later checked.

    Only tensors and plain values are unpickled. One of an older format has ``SHARED`` entries, which serve to evaluate
    it or to start from it.

    Args:
        finite: whether to refuse weights that are not, such as those of a ``crash.pt``.

    Raises:
        UserError: nothing is there, the file cannot be read, it is cut short or was altered, it is not a checkpoint of
            scclr, a newer scclr wrote it, an entry is missing or is not what scclr writes, or weights are not finite.
    """
    path = checkpoint_path(source)
    state = _read(path, finite)
    require(state["format"] <= FORMAT, f"{path}: a newer scclr wrote it; type pip install --upgrade scclr")
    return state


def _read(path: Path, finite: bool = True) -> dict[str, Any]:
    """``load`` of a file, but one of a newer format is only known to be intact."""
    data = read_bytes(path)
    body, comment = memoryview(data)[:-COMMENT], data[-COMMENT:]
    if not comment.startswith(MARK) or not data.startswith(b"PK"):
        other = "not a checkpoint of scclr" if data[-22:-18] == b"PK\5\6" or not data.startswith(b"PK") else "cut short"
        raise UserError(f"{path}: {other}; {ADVICE}")
    if comment != MARK + hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path}: altered since it was written (its checksum differs); give an intact one")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; PyTorch's texts advise to run what the file holds
        raise UserError(f"{path}: holds more than tensors and plain values, so it is not read; {ADVICE}") from error
    for holds, entry in _requirements(state, len(data)):
        require(holds, f"{path}: not a checkpoint that scclr wrote (its {entry}); {ADVICE}")
    if finite and state["format"] <= FORMAT:
        whole = all(bool(weight.isfinite().all()) for weight in state["model"].values())
        require(whole, f"{path}: its weights are not finite; give a checkpoint from before, such as last.pt")
    return dict(state)


def _requirements(state: Any, size: int) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the entry that it is about), of all that a checkpoint in a file of ``size`` bytes must be."""
    yield isinstance(state, dict), "contents"
    yield _is_a(int, state.get("format")) and state["format"] >= 0, "format"
    if state["format"] > FORMAT:
        return
    for name in ENTRIES if state["format"] == FORMAT else SHARED:
        yield _is_a(ENTRIES[name], state.get(name)), name
    yield _is_plain(state["config"]) and has_parts(state["config"]), "config"
    yield 1 <= state["image_size"] <= 10**5, "image_size"
    weights = state["model"]
    yield all(isinstance(name, str) and _is_weight(weight) for name, weight in weights.items()), "model"
    yield sum(weight.numel() for weight in weights.values()) <= size, "model"  # a view can repeat one number for ever
    for name in ("mean", "std"):
        yield name in weights and weights[name].is_floating_point(), f"model.{name}"
        yield list(weights[name].shape) == [1, weights[name].numel(), 1, 1], f"model.{name}"
    yield weights["mean"].shape == weights["std"].shape and not bool((weights["std"] <= 0).any()), "model.std"
    if state["format"] == FORMAT:
        yield 0 <= state["step"] < 2**63, "step"
        yield 0 <= state["seconds"] < 1e12, "seconds"
        yield "indices" in state["window"] or _is_window(state["window"], state["step"]), "window"


def _is_a(kind: type, value: object) -> bool:
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_weight(value: object) -> bool:
    """Whether ``value`` is a tensor that ``isfinite`` and ``copy_`` take."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_nested or value.is_quantized:
        return False
    return value.device.type == "cpu" and not (value.is_floating_point() and value.element_size() == 1)


def _is_window(window: dict[str, Any], step: int) -> bool:
    """Whether ``window`` holds the loss terms of the steps from ``begin`` to ``step``."""
    terms, begin = window.get("terms"), window.get("begin")
    if not isinstance(terms, torch.Tensor) or not isinstance(begin, int) or not _is_weight(terms):
        return False
    rows = terms.dtype == torch.float64 and terms.shape[1:] == (3,)
    return rows and begin >= 0 and begin + len(terms) == step and bool(terms.isfinite().all())


def _is_plain(node: object, depth: int = 20) -> bool:
    """Whether a configuration consists of mappings with names, lists, text, numbers, and null."""
    if isinstance(node, dict | list):
        named = isinstance(node, list) or all(isinstance(key, str) for key in node)
        values = node if isinstance(node, list) else node.values()
        return depth > 0 and named and all(_is_plain(value, depth - 1) for value in values)
    return node is None or isinstance(node, str | int | float)


def saved_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint; of another format only what its weights need, which all formats share."""
    config: dict[str, Any] = checkpoint["config"]
    if checkpoint["format"] == FORMAT:
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
            state = _read(path)
            require("indices" not in state.get("window", {}), f"{path}: the checkpoint of a crash")
        except UserError as error:
            damage = error
            os.replace(path, directory / "damaged.pt")
            print(f"{one_line(error)}: set aside as damaged.pt", file=sys.stderr)
            continue
        message = f"{path}: another version of scclr left this run unfinished; type overwrite=true to begin anew"
        require(state["format"] == FORMAT, message)
        if damage is not None:
            print(f"going on from {path.name}, at step {state['step']}", file=sys.stderr)
        return state
    require(damage is None, f"{directory}: no intact checkpoint is left; type overwrite=true to begin anew")
    return None

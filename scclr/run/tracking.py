"""The record of a run: ``metrics.jsonl``, its other files, a progress bar, and Weights & Biases.

Only this module imports wandb.
"""

import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import wandb
from PIL import Image
from tqdm import tqdm

from scclr.config.errors import UserError, one_line
from scclr.config.schema import TrackingConfig
from scclr.run.files import write_atomic, write_json, write_text

FINISH_SECONDS = 60  # for W&B to upload what is left when a run is over
LINE_SECONDS = 30  # between two lines of progress if standard error is no terminal
SHOWN = {"loss": "loss", "attract": "A", "repel": "R", "knn": "kNN", "lr": "lr", "images_per_second": "img/s"}


class Log:
    """A log that records nothing: that of every process but the main one. It can be used as a context manager."""

    latest: dict[str, float]  # the last value of each logged metric

    def __init__(self) -> None:
        self.latest = {}

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the log."""

    def say(self, text: str) -> None:
        """Print a line on standard error."""

    def show(self, text: str) -> None:
        """Print on standard output."""

    def progress(self, start: int, total: int, epochs: int) -> None:
        """Begin to show the progress of a training from step ``start`` to ``total``."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics after ``step`` finished steps."""

    def end_progress(self) -> None:
        """Leave the progress as it stands, so that other lines can follow."""

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Record the final numbers."""

    def text(self, name: str, text: str) -> None:
        """Write a text file into the run folder."""

    def json(self, name: str, value: object) -> None:
        """Write a JSON file into the run folder."""

    def picture(self, name: str, image: Callable[[], Image.Image]) -> None:
        """Write ``<name>.png`` into the run folder, and send it to W&B with the next row."""


class RunLog(Log):
    """The log of the main process.

    ``metrics.jsonl`` is the record: one JSON object a row, flushed at once. When a run is resumed, rows after its
    checkpoint are dropped and the others are sent to W&B again, so that an offline W&B run is whole too.

    Args:
        start: steps that the checkpoint holds; 0 for a fresh run.

    Raises:
        UserError: W&B cannot start, for want of a key or a network; the message names ``tracking.mode=offline``.
    """

    def __init__(
        self, directory: Path, config: TrackingConfig, *, name: str, group: str, settings: Mapping[str, Any], start: int
    ) -> None:
        super().__init__()
        self.directory, self.path = directory, directory / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start and start > 0]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.wandb = _start_wandb(directory, config, name, group, settings, resumed=start > 0)
        self.file: IO[str] = open(self.path, "a")  # noqa: SIM115
        self.bar: tqdm | None = None
        self.pictures: dict[str, Any] = {}
        for row in rows:
            self._note(row.pop("step"), row)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end_progress()
        try:
            self.file.close()  # this fails on a full disk
        finally:
            self._send(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def _send(self, call: Callable[[Any], None]) -> None:
        """``call`` with the W&B run. If its service or server is gone, our run goes on without it."""
        try:
            if self.wandb is not None:
                call(self.wandb)
        except Exception as error:  # W&B raises errors of many kinds
            reason = f"{type(error).__name__}: {one_line(error)}"
            self.say(f"W&B stopped ({reason}): metrics.jsonl goes on; `wandb sync` uploads what it had")
            self.wandb = None
            threading.Thread(target=_teardown, daemon=True).start()  # so that the next run starts its service anew

    def _note(self, step: int, row: dict[str, float]) -> None:
        self.latest |= row
        self._send(lambda run: run.log(row | self.pictures, step=step))
        self.pictures.clear()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def show(self, text: str) -> None:
        print(text)

    def progress(self, start: int, total: int, epochs: int) -> None:
        self.epochs, self.total, self.shown = epochs, total, time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=start,
            desc="pretrain",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}% |{bar:12}| {elapsed}<{remaining}{postfix}",
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        row = {f"pretrain/{key}": value for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        self._note(step, row)
        if self.bar is not None:
            self._show_progress(self.bar, step)

    def _show_progress(self, bar: tqdm, step: int) -> None:
        shown = {name: self.latest.get(f"pretrain/{key}") for key, name in SHOWN.items()}
        figures = " ".join(f"{name} {_short(value)}" for name, value in shown.items() if value is not None)
        figures = f"epoch {self.latest['pretrain/epoch']:.3g}/{self.epochs} {figures}"
        if not bar.disable:
            bar.set_postfix_str(figures, refresh=False)
            bar.update(step - bar.n)
        elif time.monotonic() - self.shown >= LINE_SECONDS or step == self.total:
            self.say(f"pretrain {100 * step / self.total:3.0f}% {figures}")
            self.shown = time.monotonic()

    def end_progress(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def summary(self, metrics: Mapping[str, float]) -> None:
        self._send(lambda run: run.summary.update(dict(metrics)))

    def text(self, name: str, text: str) -> None:
        write_text(self.directory / name, text)

    def json(self, name: str, value: object) -> None:
        write_json(self.directory / name, value)

    def picture(self, name: str, image: Callable[[], Image.Image]) -> None:
        path, page = self.directory / f"{name}.png", image()
        write_atomic(path, lambda file: page.save(file, format="png"))
        self.pictures[name] = wandb.Image(str(path))


def _teardown() -> None:
    with suppress(Exception):
        wandb.teardown()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` up to the first damaged line. A crash may have cut the last one short."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not (isinstance(row, dict) and "step" in row):
            break
        rows.append(row)
    return rows


def _start_wandb(
    directory: Path, config: TrackingConfig, name: str, group: str, settings: Mapping[str, Any], *, resumed: bool
) -> Any:
    identity = directory / "wandb" / "run-id"  # kept, so that a resumed run goes on in the same W&B run
    if config.mode != "disabled":
        identity.parent.mkdir(exist_ok=True)
        if not (resumed and identity.exists()):
            identity.write_text(secrets.token_hex(4))
        for stale in identity.parent.glob("offline-run-*"):  # its rows are sent again, or belong to no checkpoint
            shutil.rmtree(stale)
    known = "finish_timeout" in wandb.Settings.model_fields  # older versions wait for ever
    patience: dict[str, Any] = {"finish_timeout": FINISH_SECONDS} if known else {}
    try:
        return wandb.init(
            mode=config.mode,  # type: ignore[arg-type]
            project=config.project,
            entity=config.entity,
            id=identity.read_text() if config.mode != "disabled" else None,
            resume="allow" if config.mode == "online" else None,
            dir=str(directory.resolve()),  # W&B's service process has a working directory of its own
            name=name,
            group=group,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off", **patience),
        )
    except wandb.errors.Error as error:
        raise UserError(f"W&B does not start ({one_line(error)}): log in, or type tracking.mode=offline") from error

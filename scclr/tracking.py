"""The record of a run: ``metrics.jsonl``, a progress bar, and Weights & Biases. The only module that imports wandb."""

import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import wandb
from tqdm import tqdm

from scclr.checkpoint import write_atomic
from scclr.config import TrackingConfig, UserError, one_line

FINISH_SECONDS = 60  # for W&B to upload the rest when a run is over
PLAIN_SECONDS = 30  # between two lines of progress where there is no terminal for a bar
SHOWN = {"loss": "loss", "attract": "A", "repel": "R", "knn": "kNN", "lr": "lr", "images_per_second": "img/s"}


class RunLog:
    """Rows of metrics by step, kept in ``<directory>/metrics.jsonl`` and sent to W&B; a context manager.

    ``metrics.jsonl`` is the record: one JSON object a row, flushed at once. When a run resumes, rows past its
    checkpoint are dropped and the rest is replayed, so that an offline W&B run is whole too.

    Args:
        start: steps that the checkpoint holds; 0 for a fresh run.

    Raises:
        UserError: W&B cannot start (no key, no network); names ``tracking.mode=offline``.
    """

    def __init__(
        self, directory: Path, config: TrackingConfig, *, name: str, group: str, settings: Mapping[str, Any], start: int
    ) -> None:
        self.path = directory / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= start and start > 0]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.path, lambda file: file.write(text.encode()))
        self.wandb = _start_wandb(directory, config, name, group, settings, resumed=start > 0)
        for row in rows:
            values = {key: value for key, value in row.items() if key != "step"}
            self._send(partial(_log, values, row["step"]))
        self.latest: dict[str, float] = {k: value for row in rows for k, value in row.items() if k != "step"}
        self.file: IO[str] = open(self.path, "a")  # noqa: SIM115
        self.bar: tqdm | None = None
        self.pictures: dict[str, Any] = {}

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end_progress()
        try:
            self.file.close()  # on a full disk this fails
        finally:
            self._send(partial(_finish, 0 if kind is None else 1))

    def _send(self, call: Callable[[Any], None]) -> None:
        """``call`` with the W&B run. Its service or server may be gone, which does not stop ours."""
        try:
            if self.wandb is not None:
                call(self.wandb)
        except Exception as error:  # of any kind
            self._give_up(f"{type(error).__name__}: {one_line(error)}")

    def _give_up(self, reason: str) -> None:
        advice = "metrics.jsonl goes on; `wandb sync` uploads what it had"
        print(f"W&B stopped ({reason}): {advice}", file=sys.stderr)
        self.wandb = None
        threading.Thread(target=_teardown, daemon=True).start()  # so that another run starts it anew

    def progress(self, start: int, total: int, epochs: int) -> None:
        """Show a bar of steps on standard error; where that is no terminal, a line every half minute."""
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
        """Record the metrics after ``step`` finished steps."""
        row = {f"pretrain/{key}": value for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        self._send(partial(_log, row | self.pictures, step))
        self.pictures.clear()
        self.latest.update(row)
        if self.bar is not None:
            shown = {name: self.latest.get(f"pretrain/{key}") for key, name in SHOWN.items()}
            figures = " ".join(f"{name} {_short(value)}" for name, value in shown.items() if value is not None)
            figures = f"epoch {self.latest['pretrain/epoch']:.3g}/{self.epochs} {figures}"
            if not self.bar.disable:
                self.bar.set_postfix_str(figures, refresh=False)
                self.bar.update(step - self.bar.n)
            elif time.monotonic() - self.shown >= PLAIN_SECONDS or step == self.total:
                print(f"pretrain {100 * step / self.total:3.0f}% {figures}", file=sys.stderr)
                self.shown = time.monotonic()

    def end_progress(self) -> None:
        """Leave the bar as it stands, so that other lines can follow."""
        if self.bar is not None:
            self.bar.close()

    def picture(self, name: str, path: Path) -> None:
        """An image file, into W&B beside the next row."""
        self.pictures[name] = wandb.Image(str(path))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """The final numbers, into W&B's summary."""
        self._send(lambda run: run.summary.update(dict(metrics)))


def _log(values: Mapping[str, Any], step: int, run: Any) -> None:
    run.log(dict(values), step=step)


def _teardown() -> None:
    with suppress(Exception):
        wandb.teardown()


def _finish(code: int, run: Any) -> None:
    run.finish(exit_code=code)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _start_wandb(
    directory: Path, config: TrackingConfig, name: str, group: str, settings: Mapping[str, Any], *, resumed: bool
) -> Any:
    identity = directory / "wandb" / "run-id"  # kept, so that a resumed run goes on in the same W&B run
    if config.mode != "disabled":
        identity.parent.mkdir(exist_ok=True)
        if not (resumed and identity.exists()):
            identity.write_text(secrets.token_hex(4))
        for stale in identity.parent.glob("offline-run-*"):  # what it held is replayed, or was never checkpointed
            shutil.rmtree(stale)
    known = "finish_timeout" in wandb.Settings.model_fields  # older ones wait for ever
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

"""The record of a run: ``metrics.jsonl``, its other files, its progress, and Weights & Biases if it is not disabled."""

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from scclr.config.errors import one_line
from scclr.config.schema import TrackingConfig
from scclr.run.files import is_number, read_bytes, write_atomic, write_json, write_text
from scclr.run.progress import Progress, shares_terminal


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

    In W&B every metric is a chart over ``step``, the finished training steps; the final numbers are points at the last
    one. Variables such as WANDB_NAME change how it is shown (``wandb_run.described``).

    Args:
        directory: the run folder, whose name is that of the run in W&B.
        group: all seeds of a configuration share it.
        job_type: what the run does, such as ``pretrain``.
        tags: words to find the run by.
        settings: the configuration.
        start: steps that the checkpoint holds; 0 for a fresh run.

    Raises:
        UserError: W&B cannot start, for want of a key or a network; the message names ``tracking.mode=offline``.
    """

    def __init__(
        self,
        directory: Path,
        config: TrackingConfig,
        *,
        group: str,
        job_type: str,
        tags: Sequence[str],
        settings: Mapping[str, Any],
        start: int,
    ) -> None:
        super().__init__()
        self.directory, self.path, self.step = directory, directory / "metrics.jsonl", start
        self.bar: Progress | None = None
        self.pictures: dict[str, Any] = {}
        rows = [row for row in read_rows(self.path) if row["step"] <= start and start > 0]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.wandb: Any = None
        if config.mode != "disabled":
            from scclr.run.wandb_run import described, start_run  # which imports wandb

            shown = described(directory.name, group, job_type, tags, settings)
            self.wandb = start_run(directory, config, shown, resumed=start > 0)
        self._send(lambda run: run.define_metric("step", hidden=True))
        self._send(lambda run: run.define_metric("*", step_metric="step"))
        self.file: IO[str] = open(self.path, "a")  # noqa: SIM115
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
            self.say(f"W&B stopped ({reason}): metrics.jsonl goes on; `scclr sync` uploads what it had")
            self.wandb = None
            from scclr.run.wandb_run import teardown

            threading.Thread(target=teardown, daemon=True).start()  # so that the next run starts its service anew

    def _note(self, step: int, row: dict[str, float]) -> None:
        self.step = step
        self.latest |= row
        self._chart(row, step)

    def _chart(self, values: Mapping[str, float], wandb_step: int | None) -> None:
        point = {"step": self.step, **values, **self.pictures}
        self._send(lambda run: run.log(point, step=wandb_step))
        self.pictures.clear()

    def say(self, text: str) -> None:
        name = f"{self.directory.name}: " if shares_terminal() and self.directory.name not in text else ""
        print("\n".join(f"{name}{line}" for line in text.split("\n")), file=sys.stderr)

    def show(self, text: str) -> None:
        print(text)

    def progress(self, start: int, total: int, epochs: int) -> None:
        self.bar = Progress(start, total, epochs, self.say)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        row = {f"pretrain/{key}": value for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        self._note(step, row)
        if self.bar is not None:
            self.bar.show(step, self.latest)

    def end_progress(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def summary(self, metrics: Mapping[str, float]) -> None:
        self._chart(metrics, None)  # if W&B has the last step from an earlier attempt, it drops what comes with it

    def text(self, name: str, text: str) -> None:
        write_text(self.directory / name, text)

    def json(self, name: str, value: object) -> None:
        write_json(self.directory / name, value)

    def picture(self, name: str, image: Callable[[], Image.Image]) -> None:
        path, page = self.directory / f"{name}.png", image()
        write_atomic(path, lambda file: page.save(file, format="png"))
        if self.wandb is not None:
            from scclr.run.wandb_run import picture

            self.pictures[name] = picture(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` up to the first damaged line. A crash may have cut the last one short."""
    rows: list[dict[str, Any]] = []
    for line in read_bytes(path).splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int) and all(map(is_number, row.values()))):
            break
        rows.append(row)
    return rows


def check_tracking(config: TrackingConfig) -> None:
    """Refuse what W&B would refuse, before a run folder is made, and say once which of its variables have no effect.

    Raises:
        UserError: a variable with a wrong value, a folder that cannot be written, and with ``online`` no key, or no
            server that answers within seconds.
    """
    if config.mode != "disabled":
        from scclr.run.wandb_run import check

        check(config)

"""How the result of a run is shown."""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scclr.config.errors import UserError, require
from scclr.config.schema import TrainConfig, has_parts
from scclr.run.files import is_number, read_json

NEEDED = ("metrics", "seconds", "config")  # the parts of every result
NUMBERS = ("metrics", "seconds", "validation", "last")  # the parts that hold numbers
ADVICE = "type overwrite=true to run it anew"
TITLES = {"": "pretrained", "baseline/untrained/": "untrained encoder", "baseline/pixels/": "raw pixels"}


def read_result(directory: Path) -> dict[str, Any]:
    """The ``result.json`` of a run folder, with all that is read of it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not what a run writes; the message names the entry.
    """
    path = directory / "result.json"
    result = read_json(path)
    for name in dict.fromkeys((*NEEDED, *NUMBERS, "left_out")):
        part = result.get(name, None if name in NEEDED else {})
        whole = isinstance(part, dict) and (name not in NUMBERS or all(map(is_number, part.values())))
        whole = whole and (name != "config" or has_parts(part))
        require(whole, f"{path}: damaged (its {name}); {ADVICE}")
    try:
        _accuracies(result)
        result["seconds"]["total"]
    except KeyError as error:
        raise UserError(f"{path}: damaged (it lacks {error}); {ADVICE}") from error
    return result


def validation_accuracy(result: dict[str, Any]) -> float | None:
    """What a sweeper may maximize: the accuracy of the probe, or else of kNN, on the validation split."""
    found: float | None = result.get("validation", {}).get("probe/logreg", result.get("last", {}).get("pretrain/knn"))
    return found


def summary(result: dict[str, Any], directory: Path, note: str) -> str:
    """The table at the end of a run.

    Args:
        note: what to type next.
    """
    lines = ["", *_accuracies(result)]
    seconds = {"pretraining" if name == "pretrain" else name: value for name, value in result["seconds"].items()}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total" and value > 0)
    lines += [f"run   {directory}", f"time  {seconds['total']:.0f} s: {spent}", f"next  {note}"]
    return "\n".join(lines)


def _accuracies(result: dict[str, Any]) -> list[str]:
    """The accuracies as a table; nothing if there are none.

    Raises:
        KeyError: one of them is missing.
    """
    metrics, left_out = result["metrics"], result.get("left_out", {})
    columns = [name for name in metrics if name.endswith("top1") and not name.startswith("baseline/")]
    if not columns:
        return []
    lines = [f"{'test accuracy, %':<18}" + "".join(f"{name:>20}" for name in columns)]
    groups = [name.removeprefix(columns[0]) for name in metrics if name.startswith(f"{columns[0]}/")]
    for prefix, title in TITLES.items():
        if prefix in left_out:
            continue
        for group in ("", *groups):  # all, and of a long tail: /many, /medium, /few
            values = [metrics[f"{prefix}{name}{group}"] for name in columns]
            label = f"  {group[1:]} images" if group else title
            lines.append(f"{label:<18}" + "".join(f"{100 * value:>20.2f}" for value in values))
    return [*lines, ""]


def hint(config: TrainConfig, directory: Path) -> str:
    """What to type next."""
    if "probe" not in config.stages:
        encoder = str(directory) if "pretrain" in config.stages else config.init_from
        return f"scclr train stages=[probe] {shlex.quote(f'init_from={encoder}')}"
    balances = "" if config.alpha is None else " alpha=0.3,0.5,0.7"
    sweep = f"add -m{balances} seed=0,1,2 to compare {'balances' if balances else 'seeds'}"
    if config.tracking.mode == "offline":
        folder = config.tracking.dir or str(directory)
        return f"{sweep}\n      wandb sync {shlex.quote(folder)}/wandb/offline-run-*"
    return sweep


class Clock:
    """Seconds of each stage, and of the whole run."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = {"pretrain": 0.0, "probe": 0.0, "theory": 0.0}

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started

    def all(self, before: float) -> dict[str, float]:
        """All of them, rounded, and the total with ``before``, which earlier attempts took."""
        total = time.monotonic() - self.started + before
        return {name: round(value, 3) for name, value in {**self.seconds, "total": total}.items()}

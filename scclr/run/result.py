"""The result of a run: how it is read and shown, and what ``scclr evaluate`` has added to it."""

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scclr.config.errors import require
from scclr.config.schema import TrainConfig, has_parts
from scclr.run.files import is_number, read_json
from scclr.run.lock import EVALUATIONS

NEEDED = ("metrics", "seconds", "config")  # the parts of every result
NUMBERS = ("metrics", "seconds", "validation", "last")  # the parts that hold numbers
ADVICE = "type overwrite=true to run it anew"
TITLES = {"": "pretrained", "baseline/untrained/": "untrained encoder", "baseline/pixels/": "raw pixels"}
# <data>/<baseline>/<layer>/<protocol>/<metric>/<group of a long tail>; only protocol and metric are always there.
METRIC = re.compile(
    r"(?P<data>[\w.-]+/)??(?P<baseline>baseline/\w+/)?(?P<layer>z/)?"
    r"(?P<protocol>\w+-v\d+|probe/logreg|knn/k\d+)/"  # the last two are of older runs
    r"(?P<metric>.+?)(?P<group>/(?:many|medium|few))?"
)
HEADLINES = ("top1", "nmi")  # what the table shows of a protocol; without one of these its first metric


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
    require("total" in result["seconds"], f"{path}: damaged (its seconds lack the total); {ADVICE}")
    return result


def read_evaluations(directory: Path) -> dict[str, dict[str, Any]]:
    """What ``scclr evaluate`` has added to a run, by ``<dataset>-<protocol>-<hash>``.

    Raises:
        UserError: a file of it is damaged.
    """
    return {path.stem: _evaluation(path) for path in sorted((directory / EVALUATIONS).glob("*.json"))}


def _evaluation(path: Path) -> dict[str, Any]:
    record = read_json(path)
    numbers = record.get("metrics")
    whole = isinstance(numbers, dict) and all(map(is_number, numbers.values()))
    whole = whole and all(isinstance(record.get(name), str) for name in ("dataset", "protocol"))
    require(whole, f"{path}: damaged; delete it and evaluate again")
    return record


def named_evaluations(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, float]]:
    """The numbers of the evaluations of several runs, by names such as ``mnist/knn-v1/top1``.

    Where a protocol was evaluated with several options, the names have the hash of these, for all runs.

    Args:
        found: for each run, what ``read_evaluations`` returns.
    """
    hashes: dict[str, set[str]] = {}
    for stem in (stem for records in found for stem in records):
        hashes.setdefault(stem.rpartition("-")[0], set()).add(stem.rpartition("-")[2])
    rows = []
    for records in found:
        row: dict[str, float] = {}
        for stem, record in records.items():
            name, _, digest = stem.rpartition("-")
            prefix = record["dataset"] if len(hashes[name]) == 1 else f"{record['dataset']}-{digest}"
            row |= {f"{prefix}/{metric}": value for metric, value in record["metrics"].items()}
        rows.append(row)
    return rows


def validation_accuracy(result: dict[str, Any]) -> float | None:
    """What a sweeper may maximize: on the validation split, what the first protocol that chooses there has chosen by,
    or else the last accuracy of kNN during pretraining."""
    chosen_by, last = result.get("validation", {}), result.get("last", {})
    found: float | None = next(iter(chosen_by.values()), last.get("pretrain/knn"))
    return found


def summary(result: dict[str, Any], directory: Path, note: str) -> str:
    """The table at the end of a run.

    Args:
        note: what to type next.
    """
    lines = ["", *table(result["metrics"])]
    seconds = {"pretraining" if name == "pretrain" else name: value for name, value in result["seconds"].items()}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total" and value > 0)
    lines += [f"run   {directory}", f"time  {seconds['total']:.0f} s: {spent}", f"next  {note}"]
    return "\n".join(lines)


def table(metrics: Mapping[str, float]) -> list[str]:
    """The numbers of the protocols on the test split, a column for each; nothing if there are none."""
    columns: dict[str, str] = {}  # the metric that is shown of each protocol
    rows: dict[str, dict[str, float]] = {}  # by title, the values by protocol and metric
    for name, value in metrics.items():
        if (found := METRIC.fullmatch(name)) is None:
            continue
        shown = columns.setdefault(found["protocol"], found["metric"])
        if found["metric"] in HEADLINES and shown not in HEADLINES:
            columns[found["protocol"]] = found["metric"]
        title = TITLES.get(found["baseline"] or "", name) + (", z" if found["layer"] else "")
        title = f"{found['data']}{title}" if found["data"] else title
        title = f"{title}, {found['group'][1:]} images" if found["group"] else title
        row = rows.setdefault(title, {})
        row[f"{found['protocol']}/{found['metric']}"] = value
    if not columns:
        return []
    wide = max(16, *map(len, rows)) + 2
    names = [f"{protocol}/{metric}" for protocol, metric in columns.items()]
    widths = [max(20, len(name) + 2) for name in names]
    lines = [f"{'test split, %':<{wide}}" + "".join(f"{name:>{n}}" for name, n in zip(names, widths, strict=True))]
    for title, row in rows.items():
        cells = (f"{100 * row[name]:.2f}" if name in row else "" for name in names)
        lines.append(f"{title:<{wide}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)))
    return [*(line.rstrip() for line in lines), ""]


def hint(config: TrainConfig, directory: Path) -> str:
    """What to type next."""
    if "probe" not in config.stages:
        encoder = str(directory) if "pretrain" in config.stages else config.init_from
        return f"scclr train stages=[probe] {shlex.quote(f'init_from={encoder}')}"
    balances = "" if config.alpha is None else " alpha=0.3,0.5,0.7"
    sweep = f"add -m{balances} seed=0,1,2 to compare {'balances' if balances else 'seeds'}"
    if config.tracking.mode == "offline":
        return f"{sweep}\n      scclr sync {shlex.quote(config.tracking.dir or str(directory))}"
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

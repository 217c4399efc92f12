"""The runs of one or two folders: what is finished as rows of numbers, and what is not, with the reason."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from scclr.config.errors import UserError, require
from scclr.config.resolve import VOLATILE, VOLATILE_DATASET, leaves
from scclr.run.files import is_number
from scclr.run.result import named_evaluations, read_evaluations, read_result
from scclr.run.sweep import Point, listed, points_of
from scclr.run.tracking import read_rows

UNREAD = {*VOLATILE, "seed", "loss.alpha", "pretrain.compile"}  # keys that make no other configuration
ADVICE = "give a folder of runs, such as runs/default, or a run folder"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        settings: its configuration by dotted keys, without what does not change what it computes; a component by the
            word that chooses it.
        numbers: metrics; ``validation/...``; ``pretrain/...``, the last row of the log; ``seconds/...``;
            ``forecast/...``; and ``evaluations``.
        evaluations: what ``scclr evaluate`` has added, such as ``mnist/knn-v1/top1``.
    """

    directory: Path
    folder: str
    result: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)
    numbers: Mapping[str, float] = field(repr=False)
    evaluations: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.result["config"]["seed"])

    @property
    def device(self) -> str:
        """The GPU or CPU that it ran on."""
        machine = self.result.get("machine", {})
        return str(machine.get("gpu") or f"{machine.get('cpu', 'unknown')}, {machine.get('threads', '?')} threads")

    @cached_property
    def group(self) -> str:
        """What all seeds of a configuration share. One that starts from another run counts that without its seed."""
        origin = self.settings.get("init_from")
        named = self.result.get("group") if origin is None else None
        return str(named or json.dumps(self.settings, sort_keys=True, default=str))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The log of the pretraining, ``metrics.jsonl``."""
        return read_rows(self.directory / "metrics.jsonl")


@dataclass(frozen=True)
class Found:
    """What some folders hold. ``points`` are all runs, ``others`` a line for each that is not averaged."""

    folders: Sequence[Path]
    runs: Sequence[Run]
    points: Sequence[Point]
    others: Sequence[str]


def find(folders: Sequence[Path]) -> Found:
    """Read the runs of folders.

    Raises:
        UserError: a folder holds no runs.
    """
    runs: dict[tuple[str, str, int], Run] = {}
    points, others = list[Point](), list[str]()
    for folder in folders:
        here = _points(folder)
        require(len(here) > 0, f"{folder}: no runs; {ADVICE}")
        for point in here:
            points.append(point)
            try:
                run = _run(point.directory, str(folder))
            except FileNotFoundError:
                others += [line.strip() for line in listed([point])]
            except UserError as error:
                others.append(f"damaged  {error}")
            else:
                same = runs.setdefault((run.folder, run.group, run.seed), run)
                if same is not run:
                    others.append(f"repeated {run.directory}: the same configuration and seed as {same.directory}")
    return Found(folders, _with_evaluations(list(runs.values()), others), points, others)


def _with_evaluations(runs: Sequence[Run], others: list[str]) -> list[Run]:
    """The runs with what ``scclr evaluate`` has added; where that is damaged, a line of ``others`` says so."""
    records = []
    for run in runs:
        try:
            records.append(read_evaluations(run.directory))
        except UserError as error:
            records.append({})
            others.append(f"damaged  {error}")
    added = named_evaluations(records)
    return [
        replace(run, numbers={**run.numbers, **new}, evaluations=new) if new else run
        for run, new in zip(runs, added, strict=True)
    ]


def _points(folder: Path) -> list[Point]:
    """The runs of a run folder, of a folder of runs, or of a folder of such folders."""
    if (folder / "config.yaml").exists() or (folder / "result.json").exists():
        return [Point(folder, "")]
    inside = [path for path in sorted(folder.glob("*")) if path.is_dir()] if folder.is_dir() else []
    return points_of(folder) or [point for path in inside for point in points_of(path)]


def _run(directory: Path, folder: str) -> Run:
    """A finished run.

    Raises:
        FileNotFoundError: there is no result.
        UserError: it is damaged; the message names the entry.
    """
    result = read_result(directory)
    config = result["config"]
    require(type(config.get("seed")) is int, f"{directory}/result.json: damaged (its seed)")
    parts = {"": "metrics", "validation/": "validation", "seconds/": "seconds", "forecast/": "forecast"}
    numbers = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in _numbers(result, part)}
    return Run(directory, folder, result, dict(_settings(config)), {**numbers, **dict(_numbers(result, "last"))})


def _numbers(result: Mapping[str, Any], part: str) -> Iterator[tuple[str, float]]:
    node = result.get(part)
    for name, value in node.items() if isinstance(node, Mapping) else ():
        if is_number(value):
            yield str(name), float(value)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in leaves(config).items():
        root, _, name = key.partition(".")
        if key in UNREAD or root in VOLATILE or (root == "dataset" and name in VOLATILE_DATASET):
            continue
        if key == "init_from" and value is not None:
            value = re.sub(r"-seed\d+-[0-9a-f]{8}(?=/|$)", "", str(value))
        yield (key.removesuffix("._target_"), component_word(str(value))) if name == "_target_" else (key, value)


def component_word(target: str) -> str:
    """What chooses a component: the module of ``_target_``, or the class if that is a package or not in scclr."""
    parts = target.split(".")
    own = parts[0] == "scclr" and len(parts) > 3
    return parts[-2] if own and parts[-1][:1].isupper() else parts[-1]


def axes(runs: Sequence[Run]) -> list[str]:
    """The keys of the configuration that vary between runs; ``alpha`` first, then in the order of the configuration.

    A key that only some runs have, because it belongs to one of several losses or to another version, does not vary
    unless they differ among themselves.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(shown(value))
    if len({run.folder for run in runs}) > 1:
        values["folder"] = {run.folder for run in runs}
    varying = [key for key, known in values.items() if len(known) > 1]
    return sorted(varying, key=lambda key: (key != "alpha", key == "folder"))


def value_of(run: Run, axis: str) -> Any:
    """The value of a run on an axis; None if it has none."""
    return run.folder if axis == "folder" else run.settings.get(axis)


def shown(value: object) -> str:
    """A value of the configuration as one types it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.12g}"
    return json.dumps(value, default=str, separators=(",", ":")).replace('"', "")


def label(axis: str, among: Sequence[str]) -> str:
    """The name of an axis: the last part of its key, unless another axis ends in the same."""
    short = axis.rpartition(".")[2]
    return short if sum(other.rpartition(".")[2] == short for other in among) == 1 else axis

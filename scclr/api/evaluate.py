"""A finished encoder evaluated again: by other protocols or on other data, kept in the folder of its run."""

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scclr.api import Run
from scclr.components import load_splits, make_models, make_protocols, pick_device, prepare
from scclr.config.compose import parse, plan
from scclr.config.errors import did_you_mean, require
from scclr.config.resolve import essence, sources
from scclr.config.schema import TrainConfig
from scclr.config.words import dotted, root_key
from scclr.encoders.weights import has_foreign_weights
from scclr.evaluate.probe import evaluate as evaluate_by
from scclr.run import distributed, machine, torchrun
from scclr.run.files import write_arrays, write_json
from scclr.run.launch import launch, working
from scclr.run.lock import EVALUATIONS
from scclr.run.result import table
from scclr.train import FREE_MEMORY, evaluating

READ = ("protocols", "probe", "dataset", "device", "nproc", "deterministic", "overwrite")
PARTS = ("metrics", "validation", "chosen", "confusion")  # of an evaluation, by full names of protocols


def evaluate(run: Run, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Evaluate ``run`` as ``scclr evaluate <run> <words>`` does; returns a record for each protocol.

    A record is a file ``evaluations/<dataset>-<protocol>-<hash>.json`` in the run folder. The hash is one of the data,
    of all options and of the protocol's version, so it is the same in all runs that are evaluated in the same way. What
    is there already is only read, unless a word is ``overwrite=true``.

    Args:
        words: ``protocols=[knn200,ncc]``, ``dataset=<name>`` (else that of the run), and keys of ``probe``, ``dataset``
            and the machine.

    Raises:
        UserError: a word that is not read here; the data, the encoder or the machine do not allow the evaluation.
    """
    command = parse([_translated(word) for word in words])
    flags = [flag for flag in command.flags if flag.startswith("-") and flag != "--config-dir"]
    require(not flags, f"{' '.join(flags)}: no flag of this command; `scclr evaluate --help` says what it takes")
    config, overrides = composed(run, command.flags, command.overrides)
    digests: dict[str, str] = {}
    config, _ = prepare(config, overrides, digests)
    records = paths(run, config, *digests.values())
    missing = {name: path for name, path in records.items() if config.overwrite or not path.is_file()}
    if missing:
        require(os.access(run.directory, os.W_OK), f"{run.directory}: cannot be written; copy the run, or its last.pt")
        chosen = {name: node for name, node in config.probe.protocols.items() if name in missing}
        job = (replace(config, probe=replace(config.probe, protocols=chosen)), run.directory, missing)
        if config.nproc > distributed.launched_processes():
            launch(work, job, config.nproc)
        else:
            with torch.random.fork_rng():  # an evaluation seeds torch's generators
                work(job)
    stems = [path.stem for path in records.values()]
    return [run.evaluations[stem] for stem in stems] if torchrun.is_main() else []


def _translated(word: str) -> str:
    """A word of this command as one of ``scclr train``."""
    key = root_key(word)
    if word.startswith("-") or "=" not in word:
        return word
    advice = did_you_mean(key, READ) or f"; it reads {', '.join(READ)}"
    require(key in READ, f"{word}: scclr evaluate does not read {key}{advice}")
    require(dotted(word) != "probe.dataset", f"{word}: type {word.removeprefix('probe.')}")
    require(not dotted(word).startswith("probe.transfer"), f"{word}: type dataset=<name>, one dataset each time")
    return f"probe.{word}" if key == "protocols" else word


def composed(run: Run, flags: Sequence[str], overrides: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration of the evaluation, with the dataset of ``run`` unless ``overrides`` choose one; the overrides.

    Keys of ``dataset`` without a choice change the dataset of the run.
    """
    own = run.config.probe.dataset or run.config.dataset
    keys = [dotted(word) for word in overrides if root_key(word) == "dataset"]
    chosen = "dataset" in keys or "dataset._target_" in keys
    words = [f"++{word}" if not chosen and dotted(word) in keys else word for word in overrides]
    words += [] if chosen or not keys else [f"dataset._target_={own['_target_']}"]
    (point,) = plan(parse([*flags, "stages=[probe]", "init_from=run", "tracking.mode=disabled", *words])).points
    config = point.config
    changed = {key: value for key, value in config.dataset.items() if f"dataset.{key}" in keys}
    taken: dict[str, Any] = {} if chosen else {"dataset": {**own, **changed}}
    if has_foreign_weights(run.config) and "pretrain" not in run.config.stages:
        taken |= {name: getattr(run.config, name) for name in ("encoder", "init_mean", "init_std")}
    folder = str(run.directory)
    return replace(config, **taken, init_from=run.origin, runs=folder, trust=list(run.trust)), point.overrides


def paths(run: Run, config: TrainConfig, data: str) -> dict[str, Path]:
    """The file of the record of each protocol of ``config``.

    Args:
        data: what identifies the images (``Source.digest``).
    """
    name, found, protocols = dataset_name(config.dataset), {}, make_protocols(config)
    files = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in sources(config).items()}
    for protocol, node in config.probe.protocols.items():
        plain = essence(asdict(replace(config, probe=replace(config.probe, protocols={protocol: node}))))
        about = {"data": data, "dataset": plain["dataset"], "probe": plain["probe"]}
        about |= {
            "version": protocols[protocol].version,
            "sources": [files.get("dataset"), files.get(f"protocol_{protocol}")],
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        found[protocol] = run.directory / EVALUATIONS / f"{name}-{protocol}-{digest}.json"
    return found


def dataset_name(node: Mapping[str, Any]) -> str:
    """The word after ``dataset=``: the module of the target, or the class, if that is not in scclr."""
    target = str(node["_target_"]).split(".")
    return re.sub(r"\W", "_", target[-2] if target[0] == "scclr" else target[-1])


@machine.if_memory_lacks(FREE_MEMORY)
def work(job: tuple[TrainConfig, Path, dict[str, Path]]) -> None:
    """Evaluate and write the records, in one of the processes that share this; the main one writes.

    Raises:
        UserError: something that the user can mend.
    """
    config, folder, records = job
    with working(pick_device(config.device), config.deterministic) as (device, _):
        started = time.monotonic()
        torch.manual_seed(config.seed)
        splits, evaluated = load_splits(config)
        model, untrained = (found.to(device) for found in make_models(config, splits, evaluated))
        protocols = make_protocols(config)
        if distributed.is_main():
            print(f"{folder}: {', '.join(protocols)} on {dataset_name(config.dataset)}", file=sys.stderr)
        with evaluating(config, folder, "probe.batch_size"):
            found = evaluate_by(model, untrained, splits.to(device), protocols, config.probe, config.seed)
        if not distributed.is_main():
            return
        shared = {name: value for name, value in found.items() if name not in PARTS}
        shared |= {"dataset": dataset_name(config.dataset), "together": [*protocols]}
        shared |= {"seconds": {"total": round(time.monotonic() - started, 3)}}  # of all that were evaluated together
        shared |= {"machine": machine.describe(device), "versions": machine.versions()}
        for protocol, path in records.items():
            full = f"{protocol}-v{protocols[protocol].version}"
            parts = {part: {name: x for name, x in found[part].items() if _is_of(name, full)} for part in PARTS}
            path.parent.mkdir(exist_ok=True)
            if confusion := parts.pop("confusion"):
                write_arrays(path.with_suffix(".npz"), confusion)
            node = replace(config.probe, protocols={protocol: config.probe.protocols[protocol]})
            own = asdict(replace(config, probe=node))
            write_json(path, {"protocol": full, **parts, **shared, "config": own})


def report(run: Run, records: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of ``records`` as a table, and where they are kept."""
    metrics = {f"{one['dataset']}/{name}": value for one in records for name, value in one["metrics"].items()}
    return "\n".join(["", *table(metrics), f"kept  {run.directory / EVALUATIONS}"])


def _is_of(name: str, protocol: str) -> bool:
    """Whether ``name``, as ``baseline/pixels/knn-v1/top1``, belongs to ``protocol``, as ``knn-v1``."""
    return protocol in name.split("/")

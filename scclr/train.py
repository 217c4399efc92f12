"""The entry point of training: composed YAML -> typed configuration -> stages -> ``result.json``."""

import copy
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from scclr.checkpoint import HeldError, claimed, load, resume, write_atomic
from scclr.components import check_fit, load_weights, make_loss, make_model, pick_device
from scclr.config import (
    TrainConfig,
    UserError,
    adopt,
    build,
    conf_dir,
    one_line,
    refuse_ignored,
    refuse_other,
    resolve,
)
from scclr.distributed import World, joined, launched
from scclr.launch import keep_memory, repeatable, spread
from scclr.preemption import Stop
from scclr.probe import evaluated
from scclr.result import hint, machine, summary, versions
from scclr.show import sheet, write_sheet
from scclr.stages import foresee, pretrain_stage, probe_stage, theory_stage
from scclr.sweep import fail
from scclr.theory.stage import headline, table
from scclr.tracking import RunLog


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def main(composed: DictConfig) -> None:
    """One run, or one point of a sweep."""
    words, sweep = list(HydraConfig.get().overrides.task), HydraConfig.get().mode == RunMode.MULTIRUN
    config = resolve(composed)
    try:
        refuse_ignored(config, words)
        config = adopted(config, words)
        run(config)
    except Exception as error:
        known = isinstance(error, UserError)
        what = f"{error}" if known else f"{type(error).__name__}: {one_line(error)}"
        rank = f"rank {os.environ['RANK']}: " if launched() > 1 else ""
        if not isinstance(error, HeldError) and (sweep or config.directory.exists()):
            fail(config.directory, f"{rank}{what}")
        if not known:
            traceback.print_exc()
        if known or sweep:
            point = f"{' '.join(words)}: " if sweep else ""
            print(f"scclr train: error: {point}{rank}{what}", file=sys.stderr)
        if not sweep:
            raise SystemExit(1) from error
        # the other points go on, and the report at the end finds the error in the folder


def adopted(config: TrainConfig, typed: Sequence[str] = ()) -> TrainConfig:
    """``config`` with what defines the encoder taken from the checkpoint, where it is only evaluated.

    Args:
        typed: the overrides of the command line.
    """
    if config.init_from is not None and "pretrain" not in config.stages:
        return adopt(config, load(config.init_from)["config"], typed)
    return config


def run(config: TrainConfig) -> dict[str, Any]:
    """Carry out ``config.stages`` in the run's own folder and return what ``result.json`` holds.

    A finished run is only reported; an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: whatever the user can mend; nothing is left behind that was not there before or is not whole.
    """
    directory = config.directory
    finished = directory / "result.json"
    if not finished.exists() or config.overwrite:
        if config.nproc > launched():
            spread(work, config, config.nproc)
        else:
            work(config)
        note = hint(config)
    else:
        note = "this run was finished before; overwrite=true redoes it"
    if int(os.environ.get("RANK", "0")) > 0:
        return {}
    result: dict[str, Any] = json.loads(finished.read_text())
    refuse_other(config, result["config"])
    print(summary(result, directory, note))
    return result


def work(config: TrainConfig) -> None:
    """``run`` in one of the processes that share it.

    Raises:
        UserError: as ``run``.
        SystemExit: a signal asked to stop; the last finished step is in a checkpoint.
    """
    keep_memory()
    origin = load(config.init_from) if config.init_from is not None else None
    try:
        with Stop() as stop, joined(pick_device(config.device)) as (world, device):
            on = config.deterministic if config.deterministic is not None else device.type == "cpu"
            with repeatable(on):
                run_stages(config, origin, config.directory, world, device, stop)
    except torch.OutOfMemoryError as error:
        advice = "type pretrain.micro_batch=64, which keeps the gradient, or a smaller pretrain.batch_size"
        raise UserError(f"{one_line(error)}; {advice}") from error


def run_stages(
    config: TrainConfig, origin: dict[str, Any] | None, directory: Path, world: World, device: torch.device, stop: Stop
) -> None:
    """``work`` in its ``world``; ``origin`` is the checkpoint of ``init_from``. Only the leading process writes."""
    started, training = time.monotonic(), "pretrain" in config.stages
    torch.manual_seed(config.seed)
    splits = build("dataset", config.dataset).load()
    if origin is not None and not training:
        mean, std = origin["model"]["mean"].flatten().tolist(), origin["model"]["std"].flatten().tolist()
        model = make_model(config, mean, std, image_size=origin["image_size"])
    else:
        model = make_model(config, splits.mean, splits.std, image_size=splits.train.images.shape[-1])
        check_fit(config, splits)
    untrained = copy.deepcopy(model).to(device)
    if origin is not None:
        load_weights(model, origin, config)
    model.to(device)
    splits = splits.to(device)

    with claimed(directory, config.overwrite) if world.leads else nullcontext():
        world.wait()  # until the leading process has cleared what overwrite=true discards
        resumed = resume(directory) if training and world.leads else None
        if resumed is not None:
            refuse_other(config, resumed["config"])
        world.wait()  # until what is damaged is set aside
        if not world.leads:
            if training:
                pretrain_stage(config, model, splits, resume(directory), directory, world, stop, None)
            if "probe" in config.stages:
                for encoder in (model, untrained):
                    evaluated(encoder, splits, config.probe, world)
            if "theory" in config.stages:
                theory_stage(config, model, splits, world)
            return
        write_atomic(directory / "config.yaml", lambda f: f.write(OmegaConf.to_yaml(asdict(config)).encode()))
        print(f"{directory}", file=sys.stderr)
        with RunLog(
            directory,
            config.tracking,
            name=directory.name,
            group=config.group,
            settings=asdict(config),
            start=resumed["step"] if resumed else 0,
        ) as log:
            seconds = {"pretrain": 0.0, "probe": 0.0, "theory": 0.0}
            details: dict[str, Any] = {}
            if training:
                log.picture(
                    "views", write_sheet(sheet(splits, build("augment", config.augment), seed=config.seed), directory)
                )
                start = untrained if origin is None else model
                details["forecast"] = foresee(config, start, splits, quiet=resumed is not None)
                seconds["pretrain"] = pretrain_stage(config, model, splits, resumed, directory, world, stop, log)
            metrics: dict[str, float] = {}
            if "probe" in config.stages:
                clock = time.monotonic()
                metrics, chosen = probe_stage(config, model, untrained, splits, world)
                details |= chosen
                seconds["probe"] = time.monotonic() - clock
            if "theory" in config.stages:
                clock = time.monotonic()
                measured = theory_stage(config, model, splits, world)
                text = json.dumps(measured, indent=2, allow_nan=False).encode()
                write_atomic(directory / "theory.json", lambda file: file.write(text))
                metrics |= headline(measured)
                print(table(measured))
                seconds["theory"] = time.monotonic() - clock
            log.summary(metrics)
            previous = resumed["seconds"] if resumed else 0.0
            seconds["total"] = time.monotonic() - started + previous
            result = {
                "run": directory.name,
                "group": config.group,
                "metrics": metrics,
                "oracle": make_loss(config, len(splits.classes)).supervised,  # its loss has read labels
                **details,
                "last": log.latest,
                "seconds": {name: round(value, 3) for name, value in seconds.items()},
                "config": asdict(config),
                "machine": machine(device),
                "versions": versions(),
            }
        write_atomic(directory / "result.json", lambda f: f.write(json.dumps(result, indent=2).encode()))

"""The entry point of training: a configuration goes in, and the stages leave ``result.json`` in the run folder.

Every process of a run walks through the stages in the same way; only the main one writes and prints (``Log``).
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

from scclr.components import check_data, load_weights, make_loss, make_model, pick_device, prepare
from scclr.config.build import build
from scclr.config.compose import conf_dir, resolve_job
from scclr.config.errors import UserError, one_line
from scclr.config.resolve import RunIdentity, refuse_other
from scclr.config.schema import TrainConfig
from scclr.datasets import Splits
from scclr.datasets.loader import batch_indices
from scclr.datasets.show import sheet
from scclr.encoders.model import Model
from scclr.evaluate.probe import knn_accuracy, probe_encoder, probe_pixels
from scclr.pretrain.loop import precision_dtype, pretrain
from scclr.pretrain.optim import anneal, describe
from scclr.pretrain.state import NotFiniteError, TrainState
from scclr.run import distributed, machine
from scclr.run.checkpoint import Checkpoints, load, resume
from scclr.run.files import storage_error
from scclr.run.launch import launch
from scclr.run.lock import HeldError, run_lock
from scclr.run.output import survive_closed_output
from scclr.run.preemption import CheckpointSchedule, Stop
from scclr.run.result import hint, read_result, summary, validation_accuracy
from scclr.run.sweep import fail
from scclr.run.tracking import Log, RunLog
from scclr.theory.forecast import forecast_collapse
from scclr.theory.report import headline, measure, table

PARTS_CAVEAT = (
    "with pretrain.micro_batch, batch normalization uses the statistics of parts of the batch; "
    "the gradient is otherwise that of the whole batch"
)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def main(composed: DictConfig) -> float | None:
    """One run, called by a launcher of Hydra's, or by a sweeper that optimizes the validation accuracy it returns."""
    settings = HydraConfig.get()
    config = resolve_job(composed, settings.runtime.choices)
    return validation_accuracy(run(*prepare(config, list(settings.overrides.task))))


def run(config: TrainConfig, identity: RunIdentity) -> dict[str, Any]:
    """Carry out ``config.stages`` in the run's own folder, and return what ``result.json`` holds.

    A finished run is only reported. An interrupted one goes on from its last checkpoint. If the run fails, the folder
    says why in ``error.txt``.

    Raises:
        UserError: something that the user can mend; nothing half-written is left behind.
    """
    directory = identity.directory
    finished = (directory / "result.json").exists() and not config.overwrite
    try:
        if not finished and config.nproc > distributed.launched_processes():
            launch(work, (config, identity), config.nproc)
        elif not finished:
            work((config, identity))
    except Exception as error:
        if not isinstance(error, HeldError) and directory.exists():
            known = isinstance(error, UserError)
            fail(directory, str(error) if known else f"{type(error).__name__}: {one_line(error)}")
        raise
    if int(os.environ.get("RANK") or 0) > 0:
        return {}
    result = read_result(directory)
    refuse_other(config, result["config"], directory)
    note = "this run was finished before; overwrite=true redoes it" if finished else hint(config, directory)
    print(summary(result, directory, note))
    return result


def work(job: tuple[TrainConfig, RunIdentity]) -> None:
    """``run`` in one of the processes that share it. This is the edge at which a process translates errors.

    Raises:
        UserError: as ``run``.
        SystemExit: a signal asked the run to stop; the last finished step is in a checkpoint.
    """
    config, identity = job
    survive_closed_output()
    machine.keep_freed_memory()
    try:
        with Stop() as stop, distributed.process_group(pick_device(config.device)) as device:
            repeatable = device.type == "cpu" if config.deterministic is None else config.deterministic
            with machine.deterministic_kernels(repeatable):
                run_stages(config, identity, device, stop)
    except torch.OutOfMemoryError as error:
        advice = "type pretrain.micro_batch=64, which keeps the gradient, or a smaller pretrain.batch_size"
        raise UserError(f"{one_line(error)}; {advice}") from error
    except OSError as error:
        raise storage_error(error) or error from error


def run_stages(config: TrainConfig, identity: RunIdentity, device: torch.device, stop: Stop) -> None:
    """The stages in order."""
    clock, directory = Clock(), identity.directory
    torch.manual_seed(config.seed)
    splits = build("dataset", config.dataset).load()
    check_data(config, splits)
    model, untrained = make_models(config, splits)
    model, untrained, splits = model.to(device), untrained.to(device), splits.to(device)

    with run_folder(directory, config.overwrite):
        resumed = resume(directory) if "pretrain" in config.stages else None
        if resumed is not None:
            refuse_other(config, resumed["config"], directory)
        result: dict[str, Any] = {"run": directory.name, "group": identity.group, "metrics": {}}
        with open_log(config, identity, start=resumed["step"] if resumed else 0) as log:
            log.text("config.yaml", OmegaConf.to_yaml(asdict(config)))
            log.say(str(directory))
            if "pretrain" in config.stages:
                augment = build("augment", config.augment)
                log.picture("views", lambda: sheet(splits, augment, seed=config.seed))
                start = untrained if config.init_from is None else model
                result["forecast"] = forecast_stage(config, start, splits, log if resumed is None else Log())
                clock.seconds["pretrain"] = pretrain_stage(config, model, splits, resumed, directory, stop, log)
            if "probe" in config.stages:
                with clock.timing("probe"):
                    probed = probe_stage(config, model, untrained, splits, log)
                result = {**result, **probed}
            if "theory" in config.stages:
                with clock.timing("theory"):
                    measured = theory_stage(config, model, splits, log)
                result["metrics"] = {**result["metrics"], **headline(measured)}
            log.summary(result["metrics"])
        result["oracle"] = make_loss(config, len(splits.classes)).supervised  # the loss has read labels
        result |= {"last": log.latest, "seconds": clock.all(resumed["seconds"] if resumed else 0.0)}
        result |= {"config": asdict(config), "machine": machine.describe(device), "versions": machine.versions()}
        log.json("result.json", result)


def make_models(config: TrainConfig, splits: Splits) -> tuple[Model, Model]:
    """(the model as the run finds it, the same with the untrained weights of its seed)."""
    mean, std, image_size = splits.mean, splits.std, splits.train.images.shape[-1]
    origin = None if config.init_from is None else load(config.init_from)
    if origin is not None and "pretrain" not in config.stages:  # an encoder sees pixels as it was trained to
        mean, std = (tuple(origin["model"][name].flatten().tolist()) for name in ("mean", "std"))
        image_size = origin["image_size"]
    model = make_model(config, mean, std, image_size=image_size)
    untrained = copy.deepcopy(model)
    if origin is not None:
        load_weights(model, origin, config)
    return model, untrained


def forecast_stage(config: TrainConfig, model: Model, splits: Splits, log: Log) -> dict[str, float] | None:
    """What the balance will do, from ``model`` as training finds it, with a warning for each edge that it crosses."""
    form = make_loss(config, len(splits.classes)).logsumexp_form()
    if form is None:
        return None
    augment, batch = build("augment", config.augment), config.pretrain.batch_size
    found = forecast_collapse(model, splits.pretrain, augment, form, batch=batch, seed=config.seed)
    for line in found.warnings([config.last_alpha] if config.alpha is None else [config.alpha, config.last_alpha]):
        log.say(line)
    return asdict(found)


def pretrain_stage(
    config: TrainConfig,
    model: Model,
    splits: Splits,
    resumed: dict[str, Any] | None,
    directory: Path,
    stop: Stop,
    log: Log,
) -> float:
    """Pretrain ``model`` in place, from the checkpoint ``resumed`` if there is one; returns its seconds so far."""
    options, device = config.pretrain, splits.train.labels.device
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=options.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=precision_dtype(device, options.precision) == torch.float16)
    state = TrainState(model, make_loss(config, len(splits.classes)).to(device), optimizer, scaler)
    if resumed is not None:
        state.load_state_dict(resumed)
    log.say(describe(optimizer))
    if options.micro_batch is not None and any(isinstance(module, _BatchNorm) for module in model.modules()):
        log.say(PARTS_CAVEAT)
    total = options.epochs * (len(splits.pretrain) // options.batch_size)
    every = config.checkpoint
    schedule = CheckpointSchedule(steps=every.steps, seconds=every.seconds, total=total, stop=stop)
    described = {"image_size": splits.train.images.shape[-1], "config": asdict(config)}
    checkpoints = Checkpoints(directory, schedule, described, resumed["seconds"] if resumed else 0.0)
    log.progress(state.step, total, options.epochs)
    try:
        with stop.deferred():
            pretrain(
                state, splits.pretrain, build("augment", config.augment), options,
                seed=config.seed, alpha=alpha_schedule(config), checkpoints=checkpoints, log=log,
                validate=partial(knn_accuracy, model, splits, config.probe, options.knn_images),
            )  # fmt: skip
    except NotFiniteError as error:
        indices = batch_indices(config.seed, error.step, len(splits.pretrain), options.batch_size)
        checkpoints.write({**state.weights(), "step": error.step, "window": {"indices": indices}}, "crash.pt")
        raise
    log.end_progress()
    return checkpoints.seconds


def alpha_schedule(config: TrainConfig) -> Callable[[float], float] | None:
    """The balance as a function of the share of the training; None if it is constant."""
    if config.alpha is None or config.alpha_end is None:
        return None
    return partial(anneal, config.alpha_schedule, config.alpha, config.alpha_end)


def probe_stage(config: TrainConfig, model: Model, untrained: Model, splits: Splits, log: Log) -> dict[str, Any]:
    """The protocols on the encoder, on the same encoder untrained, and on raw pixels."""
    log.say("probe: encoder, untrained encoder, raw pixels")
    results = {
        "": probe_encoder(model, splits, config.probe),
        "baseline/untrained/": probe_encoder(untrained, splits, config.probe),
        "baseline/pixels/": probe_pixels(splits, config.probe),
    }
    return {
        "metrics": {prefix + name: value for prefix, r in results.items() for name, value in r.metrics.items()},
        "validation": {prefix + "probe/logreg": r.validation for prefix, r in results.items()},
        "l2": {prefix + "probe/logreg": r.l2 for prefix, r in results.items()},
        "encoder_sha256": results[""].encoder_sha256,
    }


def theory_stage(config: TrainConfig, model: Model, splits: Splits, log: Log) -> dict[str, Any]:
    """What ``theory.json`` holds: measured on training images, under the run's augmentation."""
    log.say("theory: bias, bounds and thresholds")
    measured = measure(
        model,
        splits.train,
        build("augment", config.augment),
        config.theory,
        alpha=config.last_alpha,
        temperature=config.loss.get("temperature"),
        form=make_loss(config, len(splits.classes)).logsumexp_form(),
        images=config.pretrain.batch_size,
        batch=config.probe.batch_size,
        seed=config.seed,
    )
    log.json("theory.json", measured)
    log.show(table(measured))
    return measured


@contextmanager
def run_folder(directory: Path, overwrite: bool) -> Iterator[None]:
    """Hold the run folder against other runs: the main process does so for all."""
    with run_lock(directory, overwrite) if distributed.is_main() else nullcontext():
        distributed.barrier()  # the main process has cleared what overwrite=true discards
        yield


def open_log(config: TrainConfig, identity: RunIdentity, *, start: int) -> Log:
    """The log of this process, which records only in the main one."""
    if not distributed.is_main():
        return Log()
    name, settings = identity.directory.name, asdict(config)
    return RunLog(identity.directory, config.tracking, name=name, group=identity.group, settings=settings, start=start)


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

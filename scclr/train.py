"""The entry point of training: a configuration goes in, and the stages leave ``result.json`` in the run folder.

Every process of a run walks through the stages in the same way; only the main one writes and prints (``Log``).
"""

import hashlib
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

import scclr
from scclr.components import (
    load_splits,
    load_transfers,
    make_augment,
    make_loss,
    make_models,
    make_optimizer,
    make_protocols,
    pick_device,
    prepare,
)
from scclr.config.compose import conf_dir, resolve_job
from scclr.config.errors import UserError, one_line
from scclr.config.resolve import RunIdentity, refuse_other, sources
from scclr.config.schema import TrainConfig
from scclr.datasets import Splits
from scclr.datasets.loader import batch_indices
from scclr.datasets.show import sheet
from scclr.encoders.model import Model
from scclr.encoders.weights import has_foreign_weights
from scclr.evaluate.probe import evaluate_each, knn_accuracy
from scclr.evaluate.quality import Quality, measure_quality
from scclr.pretrain.loop import Evaluation, precision_dtype, pretrain
from scclr.pretrain.online import OnlineProbe
from scclr.pretrain.optim import anneal, describe
from scclr.pretrain.state import NotFiniteError, TrainState
from scclr.run import distributed, machine, torchrun
from scclr.run.checkpoint import Checkpoints, resume
from scclr.run.files import write_arrays
from scclr.run.launch import launch, working
from scclr.run.lock import HeldError, run_lock
from scclr.run.output import survive_closed_output
from scclr.run.preemption import CheckpointSchedule, Stop
from scclr.run.result import Clock, hint, read_result, summary, validation_accuracy
from scclr.run.sweep import RECORD, fail
from scclr.run.tracking import Log, RunLog
from scclr.theory.forecast import forecast_collapse
from scclr.theory.report import bound_now, headline, measure, table

PARTS_CAVEAT = (
    "with pretrain.micro_batch, batch normalization uses the statistics of parts of the batch; "
    "the gradient is otherwise that of the whole batch"
)
SMALLER_EVALUATION = "type smaller probe.batch_size, pretrain.knn_images or theory.images, or pretrain.quality_every=0"
FREE_MEMORY = "end what else uses this memory, or type the same command where there is more"


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def main(composed: DictConfig) -> float | None:
    """One run, called by a launcher of Hydra's, or by a sweeper that optimizes the validation accuracy it returns."""
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    survive_closed_output()
    return validation_accuracy(run(*prepare(resolve_job(composed, settings.runtime.choices, overrides), overrides)))


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
        if not isinstance(error, HeldError) and (directory.exists() or (directory.parent / RECORD).exists()):
            known = isinstance(error, UserError)
            fail(directory, str(error) if known else f"{type(error).__name__}: {one_line(error)}")
        raise
    if not torchrun.is_main():
        return {}
    result = read_result(directory)
    refuse_other(config, result["config"], directory)
    note = "this run was finished before; overwrite=true redoes it" if finished else hint(config, directory)
    print(summary(result, directory, note))
    return result


@machine.if_memory_lacks(FREE_MEMORY)
def work(job: tuple[TrainConfig, RunIdentity]) -> None:
    """``run`` in one of the processes that share it. This is the edge at which a process translates errors.

    Raises:
        UserError: as ``run``.
        SystemExit: a signal asked the run to stop; the last finished step is in a checkpoint.
    """
    config, identity = job
    with working(pick_device(config.device), config.deterministic) as (device, stop):
        run_stages(config, identity, device, stop)


def run_stages(config: TrainConfig, identity: RunIdentity, device: torch.device, stop: Stop) -> None:
    """The stages in order."""
    clock, directory = Clock(), identity.directory
    torch.manual_seed(config.seed)
    splits, evaluated = load_splits(config)
    transfers = load_transfers(config)
    model, untrained = make_models(config, splits, evaluated, *transfers.values())
    model, untrained, here = model.to(device), untrained.to(device), splits.to(device)
    splits, evaluated = here, here if evaluated is splits else evaluated.to(device)

    with distributed.held_by_main(run_lock(directory, config.overwrite)):  # it clears what overwrite=true discards
        resumed = resume(directory) if "pretrain" in config.stages else None
        if resumed is not None:
            refuse_other(config, resumed["config"], directory)
        result: dict[str, Any] = {"run": directory.name, "group": identity.group, "sources": {}}  # that are not scclr's
        with open_log(config, identity, start=resumed["step"] if resumed else 0) as log:
            log.text("config.yaml", OmegaConf.to_yaml(asdict(config)))
            for group, path in sources(config).items():
                name, text = f"source_{group}.py", path.read_text()
                log.text(name, text)
                result["sources"][group] = {"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            log.say(str(directory))
            if "pretrain" in config.stages:
                augment = make_augment(config)
                log.picture("views", lambda: sheet(splits, augment, seed=config.seed))
                start = untrained if config.init_from is None else model
                result["forecast"] = forecast_stage(config, start, splits, log if resumed is None else Log())
                clock.seconds["pretrain"], result["warnings"] = pretrain_stage(
                    config, model, splits, evaluated, resumed, directory, stop, log
                )
            with clock.timing("quality"), evaluating(config, directory, "probe.batch_size"):
                quality = quality_of(config, model, splits)
                log.json("spectrum.json", quality.spectrum)
                result["metrics"] = quality.metrics
            if "probe" in config.stages:
                with clock.timing("probe"), evaluating(config, directory, "probe.batch_size"):
                    protocols = make_protocols(config)
                    log.say(f"probe: {', '.join(protocols)} on encoder, untrained encoder, raw pixels")
                    data = {"": evaluated, **transfers}
                    found = evaluate_each(model, untrained, data, protocols, config.probe, config.seed)
                    confusion = found.pop("confusion")
                    if distributed.is_main():
                        write_arrays(directory / "confusion.npz", confusion)
                    result |= found | {"metrics": result["metrics"] | found["metrics"]}
            if "theory" in config.stages:
                with clock.timing("theory"), evaluating(config, directory, "theory.images"):
                    measured = theory_stage(config, model, splits, log)
                result["metrics"] |= headline(measured)
            log.summary(result["metrics"])
        result["oracle"] = make_loss(config, len(splits.classes)).supervised  # the loss has read labels
        result |= {"last": log.latest, "seconds": clock.all(resumed["seconds"] if resumed else 0.0)}
        result |= {"config": asdict(config), "machine": machine.describe(device), "versions": machine.versions()}
        log.json("result.json", result)


@contextmanager
def evaluating(config: TrainConfig, directory: Path, key: str) -> Iterator[None]:
    """Evaluate with ``machine.pinned_arithmetic``. If memory lacks, advise a smaller ``key``, in a command that keeps a
    finished pretraining: the same command with another ``key`` would be another run."""
    part, name = key.split(".")
    smaller = f"{key}={max(1, getattr(getattr(config, part), name) // 4)}"
    if "pretrain" in config.stages:
        stages = ",".join(config.stages[1:] or ["probe"])
        again = f"scclr train stages=[{stages}] {shlex.quote(f'init_from={directory}')}"
        smaller = f"{again} {smaller} and the dataset's keys, which keeps the pretraining"
    on_cpu = "; or type the same command with device=cpu" if pick_device(config.device).type == "cuda" else ""
    with machine.pinned_arithmetic(), machine.if_memory_lacks(f"type {smaller}{on_cpu}"):
        yield


@machine.pinned_arithmetic()
def forecast_stage(config: TrainConfig, model: Model, splits: Splits, log: Log) -> dict[str, float] | None:
    """What the balance will do, from ``model`` as training finds it, with a warning for each edge that it crosses."""
    form = make_loss(config, len(splits.classes)).logsumexp_form()
    if form is None:
        return None
    augment, batch = make_augment(config), config.pretrain.batch_size
    found = forecast_collapse(model, splits.pretrain, augment, form, batch=batch, seed=config.seed)
    for line in found.warnings([config.last_alpha] if config.alpha is None else [config.alpha, config.last_alpha]):
        log.say(line)
    return asdict(found)


@machine.if_memory_lacks(machine.SMALLER_STEP)
def pretrain_stage(
    config: TrainConfig,
    model: Model,
    splits: Splits,
    evaluated: Splits,
    resumed: dict[str, Any] | None,
    directory: Path,
    stop: Stop,
    log: Log,
) -> tuple[float, list[str]]:
    """Pretrain ``model`` in place, from the checkpoint ``resumed`` if there is one; returns its seconds so far, and a
    sentence for each thing that looked wrong."""
    options, device = config.pretrain, splits.train.labels.device
    optimizer = make_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision_dtype(device, options.precision) == torch.float16)
    state = TrainState(model, make_loss(config, len(splits.classes)).to(device), optimizer, scaler)
    if options.online_probe:
        state.online = OnlineProbe(model.width("h"), len(splits.classes), device, config.seed)
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
    alpha = None  # is constant
    if config.alpha is not None and config.alpha_end is not None:
        alpha = partial(anneal, config.alpha_schedule, config.alpha, config.alpha_end)
    try:
        with stop.deferred():
            pretrain(
                state, splits.pretrain, make_augment(config), options,
                seed=config.seed, alpha=alpha, checkpoints=checkpoints, log=log,
                evaluations=evaluations(config, model, splits, evaluated),
            )  # fmt: skip
    except NotFiniteError as error:
        indices = batch_indices(config.seed, error.step, len(splits.pretrain), options.batch_size)
        checkpoints.write({**state.weights(), "step": error.step, "window": {"indices": indices}}, "crash.pt")
        raise
    log.end_progress()
    return checkpoints.seconds, list(state.watch.said.values())


def evaluations(config: TrainConfig, model: Model, splits: Splits, evaluated: Splits) -> list[Evaluation]:
    """What is measured during the training, each with the epochs between two of them."""
    options, guard = config.pretrain, machine.if_memory_lacks(SMALLER_EVALUATION)
    calls: list[Evaluation] = [
        (options.knn_every, lambda: {"knn": knn_accuracy(model, evaluated, options, config.probe.batch_size)}),
        (options.quality_every, lambda: quality_of(config, model, splits).metrics),
        (options.bound_every, lambda: bound_now(model, splits.train, make_augment(config), config)),
    ]
    return [(every, guard(machine.pinned_arithmetic()(call))) for every, call in calls]


def quality_of(config: TrainConfig, model: Model, splits: Splits) -> Quality:
    """The quality of ``model`` without labels. Of weights from elsewhere, which have no projector, that of h alone."""
    layers = ["h"] if has_foreign_weights(config) and "pretrain" not in config.stages else ["h", "z"]
    batch = config.probe.batch_size
    return measure_quality(model, splits.pretrain, make_augment(config), batch, seed=config.seed, layers=layers)


def theory_stage(config: TrainConfig, model: Model, splits: Splits, log: Log) -> dict[str, Any]:
    """What ``theory.json`` holds: measured on training images, under the run's augmentation."""
    log.say("theory: bias, bounds and thresholds")
    loss = make_loss(config, len(splits.classes))
    measured = measure(model, splits.train, make_augment(config), config, loss.logsumexp_form())
    log.json("theory.json", measured)
    log.show(table(measured))
    return measured


def open_log(config: TrainConfig, identity: RunIdentity, *, start: int) -> Log:
    """The log of this process, which records only in the main one."""
    if not distributed.is_main():
        return Log()
    target, plain = config.dataset["_target_"].split("."), asdict(config)
    tags = [config.loss_name, target[-2] if target[0] == "scclr" else target[-1], str(config.name)]
    kind = "pretrain" if "pretrain" in config.stages else "evaluate"
    return RunLog(
        identity.directory, config.tracking, group=identity.group, job_type=kind, tags=tags, settings=plain, start=start
    )


class _CallableModule(ModuleType):
    """The type of this module. It hides the function ``scclr.train``, whose name it has, so a call does the same."""

    __call__ = staticmethod(scclr.train)


sys.modules[__name__].__class__ = _CallableModule

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
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from scclr.checkpoint import HeldError, claimed, load, require_room, resume, save, write_atomic
from scclr.config import (
    TrainConfig,
    UserError,
    adopt,
    build,
    checkpoint_path,
    conf_dir,
    one_line,
    refuse_ignored,
    refuse_other,
    require,
    resolve,
)
from scclr.datasets import Splits
from scclr.distributed import World, joined, launched
from scclr.launch import repeatable, spread
from scclr.loader import batch_indices, suited
from scclr.losses import Loss
from scclr.model import Model
from scclr.optim import describe
from scclr.preemption import Pace, Stop
from scclr.pretrain import NotFiniteError, anneal, precision_of, pretrain
from scclr.probe import evaluated, features, knn_top1, probe_encoder, probe_pixels
from scclr.result import hint, machine, summary, versions
from scclr.show import sheet, write_sheet
from scclr.sweep import fail
from scclr.theory.forecast import forecast
from scclr.theory.stage import headline, measure, table
from scclr.tracking import RunLog

BATCH_NORM_CAVEAT = (
    "with pretrain.micro_batch, batch norm takes its statistics from parts of the batch; all else is equal"
)

SLACK = 2**24  # bytes for the small files of a run


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


def check(config: TrainConfig) -> None:
    """Refuse what can be refused before any data is read or file written, without allocating a weight.

    Raises:
        UserError: a component that cannot be built, a device or a checkpoint that is not there.
    """
    if config.init_from is not None:
        checkpoint_path(config.init_from)
    check_writable(Path(config.runs))
    precision_of(pick_device(config.device), config.pretrain.precision)
    batch, processes = config.pretrain.batch_size, max(launched(), config.nproc)
    check_processes(config)
    message = f"pretrain.batch_size={batch} is for all {processes} processes together: type a multiple of {processes}"
    require(batch % processes == 0, message)
    source = build("dataset", config.dataset)
    make_loss(config, classes=2)
    build("augment", config.augment)
    with torch.device("meta"):
        model = make_model(config, source.mean, source.std, image_size=getattr(source, "image_size", 32))
    build("optimizer", config.optimizer, model=model, batch_size=config.pretrain.batch_size)
    # weights and two moments of the optimiser; two checkpoints and the one that is being written
    require_room(Path(config.runs), 9 * sum(p.numel() * p.element_size() for p in model.parameters()) + SLACK)


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


def pretrain_stage(
    config: TrainConfig,
    model: Model,
    splits: Splits,
    resumed: dict[str, Any] | None,
    directory: Path,
    world: World,
    stop: Stop,
    log: RunLog | None,
) -> float:
    """Pretrain ``model`` in place, from the checkpoint ``resumed`` if there is one; returns its seconds so far.

    Only the leading process has a ``log``; it alone writes and evaluates.
    """
    options, device = config.pretrain, splits.train.labels.device
    loss, augment = make_loss(config, len(splits.classes)).to(device), build("augment", config.augment)
    optimizer = build("optimizer", config.optimizer, model=model, batch_size=options.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(device, options.precision) == torch.float16)
    start, clock, previous = 0, time.monotonic(), 0.0
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        loss.load_state_dict(resumed["loss"])
        start, previous = resumed["step"], resumed["seconds"]
    shared = world.most(start) == start
    require(shared, f"{directory}: not all processes see its checkpoint; type runs=<a folder that all machines share>")
    if log is not None:
        print(describe(optimizer), file=sys.stderr)
        if options.micro_batch is not None and has_batch_norm(model):
            print(BATCH_NORM_CAVEAT, file=sys.stderr)
    steps_per_epoch = len(splits.pretrain) // options.batch_size
    few = splits.train[torch.arange(min(options.knn_images, len(splits.train)), device=device)]

    def keep(step: int, window: dict[str, Any], name: str = "last.pt") -> None:
        if name == "last.pt" and not all(bool(x.isfinite().all()) for x in model.state_dict().values()):
            raise NotFiniteError(step)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "loss": loss.state_dict(),
            "step": step,
            "window": window,
            "seconds": previous + time.monotonic() - clock,
            "image_size": splits.train.images.shape[-1],
            "config": asdict(config),
        }
        save(directory, state, name)

    def validate() -> float:
        bank, queries = (features(model, part, config.probe.batch_size, world) for part in (few, splits.validation))
        k, temperature = config.probe.knn_k, config.probe.knn_temperature
        classes = len(splits.classes)
        return knn_top1(bank, few.labels, queries, splits.validation.labels, classes, k=k, temperature=temperature)

    def record(step: int, row: dict[str, float]) -> None:
        if log is not None:
            log.row(step, row)

    alpha = None
    if config.alpha is not None and config.alpha_end is not None:
        alpha = partial(anneal, config.alpha_schedule, config.alpha, config.alpha_end)
    if log is not None:
        log.progress(start, options.epochs * steps_per_epoch, options.epochs)
    total = options.epochs * steps_per_epoch
    pace = Pace(steps=config.checkpoint.steps, seconds=config.checkpoint.seconds, total=total, stop=stop)
    try:
        with stop.deferred():
            pretrain(
                model,
                loss,
                augment,
                optimizer,
                scaler,
                splits.pretrain,
                options,
                seed=config.seed,
                start=start,
                world=world,
                alpha=alpha,
                pace=pace,
                log=record,
                save=keep,
                knn=validate,
                carried=resumed["window"] if resumed is not None else None,
            )
    except NotFiniteError as error:
        if world.leads:
            indices = batch_indices(config.seed, error.step, len(splits.pretrain), options.batch_size)
            keep(error.step, {"indices": indices}, "crash.pt")
        raise
    if log is not None:
        log.end_progress()
    return previous + time.monotonic() - clock


def probe_stage(
    config: TrainConfig, model: Model, untrained: Model, splits: Splits, world: World
) -> tuple[dict[str, float], dict[str, Any]]:
    """The protocols on the encoder, on its untrained twin and on raw pixels: (metrics, what was chosen)."""
    print("probe: encoder, untrained encoder, raw pixels", file=sys.stderr)
    results = {
        "": probe_encoder(model, splits, config.probe, world),
        "baseline/untrained/": probe_encoder(untrained, splits, config.probe, world),
        "baseline/pixels/": probe_pixels(splits, config.probe),
    }
    metrics = {prefix + name: value for prefix, r in results.items() for name, value in r.metrics.items()}
    chosen = {prefix + "probe/logreg": r.l2 for prefix, r in results.items()}
    return metrics, {"l2": chosen, "encoder_sha256": results[""].encoder_sha256}


def theory_stage(config: TrainConfig, model: Model, splits: Splits, world: World) -> dict[str, Any]:
    """What ``theory.json`` holds: of training images, under ``config.augment``."""
    if world.leads:
        print("theory: bias, bounds and thresholds", file=sys.stderr)
    return measure(
        model,
        splits.train,
        build("augment", config.augment),
        config.theory,
        alpha=config.alphas[-1],
        temperature=config.loss.get("temperature"),
        images=config.pretrain.batch_size,
        batch=config.probe.batch_size,
        seed=config.seed,
        world=world,
    )


def foresee(config: TrainConfig, model: Model, splits: Splits, *, quiet: bool) -> dict[str, float] | None:
    """The ``Forecast`` from ``model`` as training finds it, with a line for each edge that alpha is beyond."""
    softmax = make_loss(config, len(splits.classes)).softmax()
    if softmax is None:
        return None
    augment, batch = build("augment", config.augment), config.pretrain.batch_size
    foreseen = forecast(model, splits.pretrain, augment, softmax, batch=batch, seed=config.seed)
    for line in [] if quiet else foreseen.warnings(config.alphas):
        print(line, file=sys.stderr)
    return asdict(foreseen)


def make_loss(config: TrainConfig, classes: int) -> Loss:
    """The loss; with an ``alpha_schedule``, one that may take both of its ends."""
    if config.alpha_end is not None:
        build("loss", {**config.loss, "alpha": config.alpha_end}, classes=classes)
    loss: Loss = build("loss", config.loss, classes=classes)
    return loss


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def make_model(config: TrainConfig, mean: list[float], std: list[float], *, image_size: int) -> Model:
    """The untrained model, from torch's global generator."""
    encoder = build("encoder", config.encoder, in_channels=len(mean), image_size=image_size)
    return Model(encoder, config.projector, mean, std)


def load_weights(model: Model, checkpoint: dict[str, Any], config: TrainConfig) -> None:
    """Copy a checkpoint's weights into ``model``, all of them."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        message = f"init_from={config.init_from}: its weights do not fit this encoder and projector ({detail})"
        raise UserError(message) from error


def check_fit(config: TrainConfig, splits: Splits) -> None:
    """A step needs a whole batch, a supervised loss labels, and a rotation whole images."""
    suited(build("augment", config.augment), splits.pretrain.images)
    n, batch = len(splits.pretrain), config.pretrain.batch_size
    require(batch <= n, f"pretrain.batch_size={batch} is larger than the {n} images to pretrain on: type a smaller one")
    labelled = bool((splits.pretrain.labels >= 0).all())
    supervised = make_loss(config, len(splits.classes)).supervised
    require(
        labelled or not supervised, f"loss={config.loss_name} reads labels, and this dataset pretrains without them"
    )


def check_processes(config: TrainConfig) -> None:
    """Under torchrun its own number counts; CUDA has one device for each process."""
    started, n = launched(), config.nproc
    require(n in (1, started) or started == 1, f"nproc={n} inside torchrun with {started} processes: drop nproc={n}")
    devices = torch.cuda.device_count()
    if pick_device(config.device).type == "cuda":
        require(n <= devices, f"nproc={n}: there are {devices} CUDA devices here; type nproc={devices}")


def check_writable(folder: Path) -> None:
    """``folder``, or the nearest one above it that exists, takes new files."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    require(writable, f"runs={folder}: {existing} cannot be written; type runs=<a folder of yours>")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is any.

    Raises:
        UserError: cuda without CUDA.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device=cuda: PyTorch finds no CUDA device here; type device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

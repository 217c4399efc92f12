"""The stages of a run: what each is given of the configuration, and what it leaves."""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scclr.checkpoint import save
from scclr.components import make_loss
from scclr.config import TrainConfig, build, require
from scclr.datasets import Splits
from scclr.distributed import World
from scclr.loader import batch_indices
from scclr.model import Model
from scclr.optim import describe
from scclr.preemption import Pace, Stop
from scclr.pretrain import NotFiniteError, anneal, precision_of, pretrain
from scclr.probe import features, knn_top1, probe_encoder, probe_pixels
from scclr.theory.forecast import forecast
from scclr.theory.stage import measure
from scclr.tracking import RunLog

BATCH_NORM_CAVEAT = (
    "with pretrain.micro_batch, batch norm takes its statistics from parts of the batch; all else is equal"
)


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


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())

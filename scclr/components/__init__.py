"""What a run is made of, built from its configuration, and refused before the first step if it cannot work."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from scclr.components.make import (
    check_channels,
    load_weights,
    make_augment,
    make_dataset,
    make_evaluated,
    make_foreign,
    make_loss,
    make_model,
    make_models,
    make_optimizer,
    make_protocols,
    make_transfers,
    pick_device,
    try_loss,
)
from scclr.config.build import is_own
from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import RunIdentity, adopt, checkpoint_path, identify, refuse_ignored
from scclr.config.schema import TrainConfig
from scclr.datasets import CLASS_FOLDERS_ADVICE, Splits
from scclr.datasets.loader import refuse_rotation
from scclr.encoders.model import Model, activations
from scclr.encoders.weights import check_foreign, has_foreign_weights, load_foreign
from scclr.evaluate.features import chosen_rows
from scclr.pretrain.loop import compiles, precision_dtype
from scclr.run import torchrun
from scclr.run.checkpoint import load, saved_config
from scclr.run.distributed import launched_processes
from scclr.run.files import nearest_existing, require_room
from scclr.run.machine import memory_limit
from scclr.run.tracking import check_tracking
from scclr.theory import check_labels

__all__ = [
    "check", "check_data", "load_splits", "load_transfers", "load_weights", "make_augment", "make_dataset",
    "make_foreign", "make_loss", "make_model", "make_models", "make_optimizer", "make_protocols", "pick_device",
    "prepare",
]  # fmt: skip
SMALL_FILES = 2**24  # bytes that a run needs besides its checkpoints
UNSUPERVISED = ", evaluate on others by probe.dataset=<name>, or type stages=[pretrain] pretrain.knn_every=0"
STATES = 4  # of the weights in memory, or more: they, those of the untrained encoder, the gradient and a moment
COPIES = 9  # of the weights: they and two moments of the optimizer, in two checkpoints and one that is being written


def prepare(
    config: TrainConfig, overrides: Sequence[str], digests: dict[str, str] | None = None, *, here: bool = True
) -> tuple[TrainConfig, RunIdentity]:
    """The configuration of a run, completed from the checkpoint that it evaluates, and its identity.

    Args:
        overrides: of the command line.
        digests: those of the datasets of other points of the sweep; this one's is added.
        here: the run works on this machine; else it is submitted to another, which has its own devices and memory.

    Raises:
        UserError: an override would be ignored; the run cannot work (``check``), unless it is finished already.
    """
    check_foreign(config, overrides)
    if not has_foreign_weights(config):
        refuse_ignored(config, overrides)
        if config.init_from is not None and "pretrain" not in config.stages:
            config = adopt(config, saved_config(load(config.init_from)), overrides)
    digests = {} if digests is None else digests
    read = json.dumps([config.dataset, config.probe.dataset, config.probe.transfer])
    if read not in digests:
        sources = [make_dataset(config), make_evaluated(config), *make_transfers(config).values()]
        digests[read] = "-".join(source.digest() for source in sources if source)
    identity = identify(config, digests[read])
    if config.overwrite or not (identity.directory / "result.json").exists():
        check(config, here)
    return config, identity


def check(config: TrainConfig, here: bool = True) -> None:
    """Refuse what can be refused before images are read or files written. No weight is allocated.

    Raises:
        UserError: a component cannot be built, or a device, a checkpoint, or room on the disk is missing.
    """
    check_foreign(config)
    if config.init_from is not None:
        checkpoint_path(config.init_from)
    check_writable(Path(config.runs))
    if here:
        check_processes(config)
        device = pick_device(config.device)
        precision_dtype(device, config.pretrain.precision)
        compiles(device, config.pretrain.compile)
    batch, processes = config.pretrain.batch_size, max(launched_processes(), config.nproc)
    message = f"pretrain.batch_size={batch} is for all {processes} processes together: type a multiple of {processes}"
    require(batch % processes == 0, message)
    message = "pretrain.compile=graphs takes one process and whole batches: type pretrain.compile=auto"
    whole = processes == 1 and config.pretrain.micro_batch is None
    require(whole or config.pretrain.compile != "graphs", message)
    source, evaluated, transfers = make_dataset(config), make_evaluated(config), make_transfers(config)
    unread = f"stages=[{','.join(config.stages)}] would ignore probe.transfer: drop it, or add the stage probe"
    require(not transfers or "probe" in config.stages, unread)
    if evaluated is not None:
        message = f"stages=[{','.join(config.stages)}] would ignore probe.dataset"
        require("pretrain" in config.stages, f"{message}: type dataset=<name>, which is what it evaluates on")
        evaluates = "probe" in config.stages or config.pretrain.knn_every > 0
        require(evaluates, f"{message}, and pretrain.knn_every=0 too: drop it, or add the stage probe")
    try_loss(config)
    make_protocols(config)
    augment = make_augment(config)
    if source.streamed and {"pretrain", "theory"}.intersection(config.stages):
        refuse_rotation(augment)
    image_size = getattr(source, "image_size", None)  # unknown of a dataset that does not say it: no stem warns at 224
    with torch.device("meta"):
        model = make_model(config, source.mean, source.std, image_size=image_size or 224)
    if has_foreign_weights(config) and image_size is not None:
        load_foreign(model.encoder, str(config.init_from))
    make_optimizer(config, model)
    seen = [len(data.mean) for data in (evaluated or source, *transfers.values())]
    check_channels(config, model, len(source.mean), seen)
    if here:
        check_memory(config, model, len(augment.views), augment.size or image_size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    require_room(Path(config.runs), COPIES * weights + SMALL_FILES)
    if torchrun.is_main():
        check_tracking(config.tracking)


def check_memory(config: TrainConfig, model: Model, views: int, side: int | None) -> None:
    """Refuse a run that certainly needs more memory than there is.

    Counted are the weights, as often as a run holds them, and for each view of a step its pixels and what the backward
    pass keeps of it. A run needs more than this.

    Args:
        model: on the meta device.
        side: pixels on a side of a view, if they are known yet.
    """
    device = pick_device(config.device)
    cuda, processes = device.type == "cuda", max(launched_processes(), config.nproc)
    limit = torch.cuda.get_device_properties(device).total_memory if cuda else memory_limit() // config.nproc
    there = f"of the {limit / 2**30:,.1f} GiB of memory" + (" of a process" if config.nproc > 1 and not cuda else "")
    held = STATES * sum(p.numel() * p.element_size() for p in model.parameters())
    weights = f"weights, gradients and optimizer take {held / 2**30:,.1f} GiB or more {there}"
    require(held < limit, f"{weights}: type a smaller encoder, projector.hidden_dim or projector.out_dim")
    if side is None or "pretrain" not in config.stages:
        return
    try:
        kept = activations(model, side) if is_own("encoder", config.encoder) else 0
    except ValueError as error:
        raise UserError(f"{error}; type another augment.size, or another encoder") from error
    width = precision_dtype(device, config.pretrain.precision).itemsize
    image = views * (4 * model.channels * side**2 + width * kept)  # bytes
    at_once = min(config.pretrain.batch_size // processes, config.pretrain.micro_batch or config.pretrain.batch_size)
    fit = int((limit - held) / image / 2)  # half of the memory is left to what is not counted
    step = f"{views} views of {at_once} images, {side} x {side} pixels each, take {image * at_once / 2**30:,.1f} GiB"
    advice = f"type pretrain.micro_batch={fit}" if fit > 0 else "type a smaller augment.size or encoder"
    require(held + image * at_once < limit, f"{step} or more {there}: {advice}")


def load_splits(config: TrainConfig) -> tuple[Splits, Splits]:
    """(the data of the run, what the encoder is evaluated on): the same, unless ``probe.dataset`` names other data.

    Raises:
        UserError: as ``Source.load`` and ``check_data``.
    """
    evaluated = make_evaluated(config)
    splits = make_dataset(config).load(partial(check_data, config))
    if evaluated is None:
        return splits, splits
    try:
        return splits, evaluated.load(partial(check_evaluated, config))
    except UserError as error:
        raise UserError(f"probe.dataset: {error}") from error


def load_transfers(config: TrainConfig) -> dict[str, Splits]:
    """The datasets of ``probe.transfer`` by name.

    Raises:
        UserError: as ``Source.load`` and ``check_evaluated``.
    """
    found = {}
    for name, source in make_transfers(config).items():
        try:
            found[name] = source.load(partial(check_evaluated, config))
        except UserError as error:
            raise UserError(f"probe.transfer.{name}: {error}") from error
    return found


def check_data(config: TrainConfig, splits: Splits) -> None:
    """Refuse data that a stage of the run could not use.

    Raises:
        UserError: fewer images than a batch, a loss that needs labels which are not there, one class where classes are
            told apart, or too few labelled images for the theory.
    """
    pretrains = "pretrain" in config.stages
    supervised = pretrains and make_loss(config, max(2, len(splits.classes))).supervised
    evaluates = "probe" in config.stages or (pretrains and config.pretrain.knn_every > 0)
    theory = "theory" in config.stages or (pretrains and config.pretrain.bound_every > 0)
    if supervised or theory or (evaluates and config.probe.dataset is None):
        check_classes(splits, "" if supervised or theory else UNSUPERVISED)
    if evaluates and config.probe.dataset is None:
        check_evaluated(config, splits)
    if pretrains:
        n, batch = len(splits.pretrain), config.pretrain.batch_size
        message = f"pretrain.batch_size={batch} is larger than the {n} images to pretrain on: type a smaller one"
        require(batch <= n, message)
        labelled = bool((splits.pretrain.labels >= 0).all())
        message = f"loss={config.loss_name} reads labels, and this dataset pretrains without them"
        require(labelled or not supervised, message)
        message = "pretrain.online_probe=true reads labels, and this dataset pretrains without them: drop it"
        require(labelled or not config.pretrain.online_probe, message)
    if theory:
        rows = chosen_rows(len(splits.train), config.seed, config.theory.images)
        try:
            check_labels(splits.train.labels[rows])
        except ValueError as error:
            raise UserError(f"theory: {one_line(error)}; type a larger theory.images, or more images") from error


def check_evaluated(config: TrainConfig, splits: Splits) -> None:
    """Refuse data that cannot be evaluated on: as ``check_classes``, and as each protocol, if the probe is a stage."""
    check_classes(splits)
    for name, protocol in make_protocols(config).items() if "probe" in config.stages else ():
        try:
            protocol.check(splits)
        except UserError as error:
            raise UserError(f"probe.protocols.{name}: {error}") from error


def check_classes(splits: Splits, alternative: str = "") -> None:
    """Raise ``UserError`` unless the images are of two classes or more.

    Args:
        alternative: what else the user can type.
    """
    require(bool(splits.classes), f"these images have no labels; give labelled ones{alternative}")
    message = f"all images are of one class, {splits.classes[0]!r}: dataset.root may be a level too high"
    require(len(splits.classes) > 1, f"{message}; {CLASS_FOLDERS_ADVICE}{alternative}")


def check_processes(config: TrainConfig) -> None:
    """Under torchrun its own number of processes counts. With CUDA each process needs a device."""
    started, n = launched_processes(), config.nproc
    require(n in (1, started) or started == 1, f"nproc={n} inside torchrun with {started} processes: drop nproc={n}")
    devices = torch.cuda.device_count()
    if pick_device(config.device).type == "cuda":
        require(n <= devices, f"nproc={n}: there are {devices} CUDA devices here; type nproc={devices}")


def check_writable(folder: Path) -> None:
    """``folder``, or the nearest one above it that exists, takes new files."""
    existing = nearest_existing(folder)
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    require(writable, f"runs={folder}: {existing} cannot be written; type runs=<a folder of yours>")

"""What a run is made of, built from its configuration, and refused before the first step if it cannot work."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scclr.config.build import build
from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import RunIdentity, adopt, checkpoint_path, identify, refuse_ignored
from scclr.config.schema import TrainConfig
from scclr.datasets import Splits
from scclr.datasets.loader import with_view_size
from scclr.encoders.model import Model
from scclr.losses import Loss
from scclr.pretrain.loop import precision_dtype
from scclr.run.checkpoint import load, saved_config
from scclr.run.distributed import launched_processes
from scclr.run.files import nearest_existing, require_room
from scclr.theory import check_labels
from scclr.theory.report import chosen_rows

SMALL_FILES = 2**24  # bytes that a run needs besides its checkpoints
COPIES = 9  # of the weights: they and two moments of the optimizer, in two checkpoints and one that is being written


def prepare(
    config: TrainConfig, overrides: Sequence[str], digests: dict[str, str] | None = None
) -> tuple[TrainConfig, RunIdentity]:
    """The configuration of a run, completed from the checkpoint that it evaluates, and its identity.

    Args:
        overrides: of the command line.
        digests: those of the datasets of other points of the sweep; this one's is added.

    Raises:
        UserError: an override would be ignored; the run cannot work (``check``), unless it is finished already.
    """
    refuse_ignored(config, overrides)
    if config.init_from is not None and "pretrain" not in config.stages:
        config = adopt(config, saved_config(load(config.init_from)), overrides)
    digests, dataset = {} if digests is None else digests, json.dumps(config.dataset)
    if dataset not in digests:
        digests[dataset] = build("dataset", config.dataset).digest()
    identity = identify(config, digests[dataset])
    if config.overwrite or not (identity.directory / "result.json").exists():
        check(config)
    return config, identity


def check(config: TrainConfig) -> None:
    """Refuse what can be refused before images are read or files written. No weight is allocated.

    Raises:
        UserError: a component cannot be built, or a device, a checkpoint, or room on the disk is missing.
    """
    if config.init_from is not None:
        checkpoint_path(config.init_from)
    check_writable(Path(config.runs))
    check_processes(config)
    precision_dtype(pick_device(config.device), config.pretrain.precision)
    batch, processes = config.pretrain.batch_size, max(launched_processes(), config.nproc)
    message = f"pretrain.batch_size={batch} is for all {processes} processes together: type a multiple of {processes}"
    require(batch % processes == 0, message)
    source = build("dataset", config.dataset)
    make_loss(config, classes=2)
    build("augment", config.augment)
    with torch.device("meta"):
        model = make_model(config, source.mean, source.std, image_size=getattr(source, "image_size", 32))
    build("optimizer", config.optimizer, model=model, batch_size=batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    require_room(Path(config.runs), COPIES * weights + SMALL_FILES)


def check_data(config: TrainConfig, splits: Splits) -> None:
    """Refuse data that a stage of the run could not use.

    Raises:
        UserError: fewer images than a batch, a loss that needs labels which are not there, a rotation of images that
            are cropped while they are read, or too few labelled images for the theory.
    """
    if "pretrain" in config.stages:
        with_view_size(build("augment", config.augment), splits.pretrain.images)
        n, batch = len(splits.pretrain), config.pretrain.batch_size
        message = f"pretrain.batch_size={batch} is larger than the {n} images to pretrain on: type a smaller one"
        require(batch <= n, message)
        labelled = bool((splits.pretrain.labels >= 0).all())
        supervised = make_loss(config, len(splits.classes)).supervised
        message = f"loss={config.loss_name} reads labels, and this dataset pretrains without them"
        require(labelled or not supervised, message)
    if "theory" in config.stages:
        rows = chosen_rows(len(splits.train), config.seed, config.theory.images)
        try:
            check_labels(splits.train.labels[rows])
        except ValueError as error:
            raise UserError(f"theory: {one_line(error)}; type a larger theory.images, or more images") from error


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


def make_loss(config: TrainConfig, classes: int) -> Loss:
    """The loss. With an ``alpha_schedule``, both ends are checked."""
    if config.alpha_end is not None:
        build("loss", {**config.loss, "alpha": config.alpha_end}, classes=classes)
    loss: Loss = build("loss", config.loss, classes=classes)
    return loss


def make_model(config: TrainConfig, mean: Sequence[float], std: Sequence[float], *, image_size: int) -> Model:
    """The untrained model. Its weights are drawn from torch's global generator."""
    encoder = build("encoder", config.encoder, in_channels=len(mean), image_size=image_size)
    return Model(encoder, config.projector, mean, std)


def load_weights(model: Model, checkpoint: dict[str, Any], config: TrainConfig) -> None:
    """Copy all weights of a checkpoint into ``model``."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        message = f"init_from={config.init_from}: its weights do not fit this encoder and projector ({detail})"
        raise UserError(message) from error


def pick_device(name: str) -> torch.device:
    """The device that ``device=<name>`` means; ``auto`` is CUDA if there is any.

    Raises:
        UserError: cuda without CUDA.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device=cuda: PyTorch finds no CUDA device here; type device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

"""What a run is made of, built from its configuration, and refused early where it cannot work."""

import os
from pathlib import Path
from typing import Any

import torch

from scclr.checkpoint import require_room
from scclr.config import TrainConfig, UserError, build, checkpoint_path, require
from scclr.datasets import Splits
from scclr.distributed import launched
from scclr.loader import suited
from scclr.losses import Loss
from scclr.model import Model
from scclr.pretrain import precision_of

SLACK = 2**24  # bytes for the small files of a run


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


def make_loss(config: TrainConfig, classes: int) -> Loss:
    """The loss; with an ``alpha_schedule``, one that may take both of its ends."""
    if config.alpha_end is not None:
        build("loss", {**config.loss, "alpha": config.alpha_end}, classes=classes)
    loss: Loss = build("loss", config.loss, classes=classes)
    return loss


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


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is any.

    Raises:
        UserError: cuda without CUDA.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device=cuda: PyTorch finds no CUDA device here; type device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

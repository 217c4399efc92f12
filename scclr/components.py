"""What a run is made of, built from its configuration, and refused before the first step if it cannot work."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scclr.augment import Augment
from scclr.config.build import build, is_own
from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import RunIdentity, adopt, checkpoint_path, identify, refuse_ignored
from scclr.config.schema import TrainConfig
from scclr.datasets import CLASS_FOLDERS_ADVICE, Source, Splits
from scclr.datasets.loader import refuse_rotation
from scclr.encoders.model import Model, activations
from scclr.losses import Loss, LossTerms
from scclr.pretrain.loop import precision_dtype
from scclr.run import torchrun
from scclr.run.checkpoint import load, saved_config
from scclr.run.distributed import launched_processes
from scclr.run.files import nearest_existing, require_room
from scclr.run.machine import memory_limit
from scclr.run.tracking import check_tracking
from scclr.theory import check_labels
from scclr.theory.report import chosen_rows

SMALL_FILES = 2**24  # bytes that a run needs besides its checkpoints
KINDS: dict[str, tuple[type, str]] = {
    "dataset": (Source, "derive from scclr.datasets.Source, and define read()"),
    "augment": (Augment, "derive from scclr.augment.Augment"),
    "encoder": (nn.Module, "derive from torch.nn.Module, and set feature_dim to the width of its output [B, D]"),
    "loss": (Loss, "derive from scclr.losses.Loss, and define terms(anchors)"),
    "optimizer": (Optimizer, "give a torch.optim.Optimizer"),
}  # what each group of the configuration builds, and what to do about a component that is none
STATES = 4  # of the weights in memory, or more: they, those of the untrained encoder, the gradient and a moment
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
        digests[dataset] = make_dataset(config).digest()
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
    source = make_dataset(config)
    try_loss(config)
    augment = make_augment(config)
    if source.streamed and {"pretrain", "theory"}.intersection(config.stages):
        refuse_rotation(augment)
    image_size = getattr(source, "image_size", None)  # unknown of a dataset that does not say it: no stem warns at 224
    with torch.device("meta"):
        model = make_model(config, source.mean, source.std, image_size=image_size or 224)
    make_optimizer(config, model)
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
    kept = activations(model, side) if is_own("encoder", config.encoder) else 0
    width = precision_dtype(device, config.pretrain.precision).itemsize
    image = views * (4 * model.channels * side**2 + width * kept)  # bytes
    at_once = min(config.pretrain.batch_size // processes, config.pretrain.micro_batch or config.pretrain.batch_size)
    fit = int((limit - held) / image / 2)  # half of the memory is left to what is not counted
    step = f"{views} views of {at_once} images, {side} x {side} pixels each, take {image * at_once / 2**30:,.1f} GiB"
    advice = f"type pretrain.micro_batch={fit}" if fit > 0 else "type a smaller augment.size or encoder"
    require(held + image * at_once < limit, f"{step} or more {there}: {advice}")


def check_data(config: TrainConfig, splits: Splits) -> None:
    """Refuse data that a stage of the run could not use.

    Raises:
        UserError: fewer images than a batch, a loss that needs labels which are not there, one class where classes are
            told apart, or too few labelled images for the theory.
    """
    pretrains = "pretrain" in config.stages
    supervised = pretrains and make_loss(config, max(2, len(splits.classes))).supervised
    classifies = "probe" in config.stages or (pretrains and config.pretrain.knn_every > 0) or supervised
    message = f"all images are of one class, {splits.classes[0]!r}: dataset.root may be a level too high"
    unlabelled = "" if supervised else ", or type stages=[pretrain] pretrain.knn_every=0, which needs no classes"
    require(len(splits.classes) > 1 or not classifies, f"{message}; {CLASS_FOLDERS_ADVICE}{unlabelled}")
    if pretrains:
        n, batch = len(splits.pretrain), config.pretrain.batch_size
        message = f"pretrain.batch_size={batch} is larger than the {n} images to pretrain on: type a smaller one"
        require(batch <= n, message)
        labelled = bool((splits.pretrain.labels >= 0).all())
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


def make(group: str, node: dict[str, Any], **given: Any) -> Any:
    """Build the component of a group, and refuse what is none.

    Raises:
        UserError: as ``build``; the target is of another kind than ``KINDS`` says.
    """
    component = build(group, node, **given)
    kind, advice = KINDS[group]
    refused = f"{group}._target_={node['_target_']}: this is no {group}; {advice}"
    require(isinstance(component, kind), refused)
    require(group != "encoder" or isinstance(getattr(component, "feature_dim", None), int), refused)
    return component


def make_dataset(config: TrainConfig) -> Source:
    """The dataset, of which nothing is read yet."""
    source: Source = make("dataset", config.dataset)
    return source


def make_augment(config: TrainConfig) -> Augment:
    """The augmentation."""
    augment: Augment = make("augment", config.augment)
    return augment


def make_optimizer(config: TrainConfig, model: Model) -> Optimizer:
    """The optimizer of the model's weights."""
    batch = config.pretrain.batch_size
    optimizer: Optimizer = make("optimizer", config.optimizer, model=model, batch_size=batch)
    return optimizer


def make_loss(config: TrainConfig, classes: int) -> Loss:
    """The loss. With an ``alpha_schedule``, both ends are checked."""
    if config.alpha_end is not None:
        make("loss", {**config.loss, "alpha": config.alpha_end}, classes=classes)
    loss: Loss = make("loss", config.loss, classes=classes)
    return loss


def try_loss(config: TrainConfig) -> None:
    """Build the loss, and call one that is not scclr's own on a small batch: its first error comes before the training.

    Raises:
        UserError: it cannot be built, does not return ``LossTerms`` of scalars, or has no gradient.
    """
    loss = make_loss(config, classes=2)
    if is_own("loss", config.loss):
        return
    z = nn.functional.normalize(torch.eye(4, 3) + 0.1, dim=1).requires_grad_()
    terms = loss(z, z.roll(1, 0), labels=torch.tensor([0, 0, 1, 1]))
    returned = f"loss._target_={config.loss['_target_']}: terms() must return scclr.losses.LossTerms of three scalars"
    scalars = isinstance(terms, LossTerms) and all(isinstance(term, torch.Tensor) and term.ndim == 0 for term in terms)
    require(scalars, f"{returned}; balance(self.alpha, attract, repel) makes them")
    require(terms.total.requires_grad, f"{returned}, and its total must depend on anchors.z")


def make_model(config: TrainConfig, mean: Sequence[float], std: Sequence[float], *, image_size: int) -> Model:
    """The untrained model. Its weights are drawn from torch's global generator."""
    encoder = make("encoder", config.encoder, in_channels=len(mean), image_size=image_size)
    return Model(encoder, config.projector, mean, std)


@torch.no_grad()
def try_encoder(config: TrainConfig, model: Model, image_size: int) -> None:
    """Call an encoder that is not scclr's own on two images: its first error comes before anything is written.

    Raises:
        UserError: its output is not [2, feature_dim].
    """
    if is_own("encoder", config.encoder):
        return
    training = model.training
    h = model.eval().represent(torch.zeros(2, model.channels, image_size, image_size))
    model.train(training)
    width = model.encoder.feature_dim
    message = f"encoder._target_={config.encoder['_target_']}: it gives {list(h.shape)} for 2 images, and feature_dim"
    require(list(h.shape) == [2, width], f"{message} is {width}: give h [B, feature_dim]")


def make_models(config: TrainConfig, splits: Splits) -> tuple[Model, Model]:
    """(the model as the run finds it, the same with the untrained weights of its seed)."""
    mean, std, image_size = splits.mean, splits.std, splits.train.images.shape[-1]
    origin = None if config.init_from is None else load(config.init_from)
    if origin is not None and "pretrain" not in config.stages:  # an encoder sees pixels as it was trained to
        mean, std = (tuple(origin["model"][name].flatten().tolist()) for name in ("mean", "std"))
        image_size = origin["image_size"]
    model = make_model(config, mean, std, image_size=image_size)
    try_encoder(config, model, image_size)
    untrained = copy.deepcopy(model)
    if origin is not None:
        load_weights(model, origin, f"init_from={config.init_from}")
    return model, untrained


def load_weights(model: Model, checkpoint: dict[str, Any], source: str) -> None:
    """Copy all weights of the checkpoint, which comes from ``source``, into ``model``."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        message = f"{source}: its weights do not fit this encoder and projector ({detail})"
        raise UserError(message) from error


def pick_device(name: str) -> torch.device:
    """The device that ``device=<name>`` means; ``auto`` is CUDA if there is any.

    Raises:
        UserError: cuda without CUDA.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device=cuda: PyTorch finds no CUDA device here; type device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

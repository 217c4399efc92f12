"""The components of a run, built from its configuration, and its model.

Only ``make_models`` reads a file, that of ``init_from``. Nothing is written.
"""

import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scclr.augment import Augment
from scclr.config.build import build, group_of, is_own
from scclr.config.errors import UserError, one_line, require
from scclr.config.schema import TrainConfig
from scclr.datasets import Source, Splits
from scclr.encoders.model import Model
from scclr.encoders.weights import IMAGENET, has_foreign_weights, load_foreign, load_own, pixel_statistics
from scclr.evaluate.protocol import Protocol
from scclr.losses import Loss, LossTerms
from scclr.run import torchrun
from scclr.run.checkpoint import load

KINDS: dict[str, tuple[type, str]] = {
    "dataset": (Source, "derive from scclr.datasets.Source, and define read()"),
    "augment": (Augment, "derive from scclr.augment.Augment"),
    "encoder": (nn.Module, "derive from torch.nn.Module, and set feature_dim to the width of its output [B, D]"),
    "loss": (Loss, "derive from scclr.losses.Loss, and define terms(anchors)"),
    "optimizer": (Optimizer, "give a torch.optim.Optimizer"),
    "protocol": (Protocol, "derive from scclr.evaluate.protocol.Protocol, and define __call__(features)"),
}  # what each group of the configuration builds, and what to do about a component that is none


def make(name: str, node: dict[str, Any], **given: Any) -> Any:
    """Build the component at the key ``name``, and refuse what is none of its group.

    Raises:
        UserError: as ``build``; the target is of another kind than ``KINDS`` says.
    """
    component, group = build(name, node, **given), group_of(name)
    kind, advice = KINDS[group]
    refused = f"{name}._target_={node['_target_']}: this is no {group}; {advice}"
    require(isinstance(component, kind), refused)
    require(group != "encoder" or isinstance(getattr(component, "feature_dim", None), int), refused)
    return component


def make_dataset(config: TrainConfig) -> Source:
    """The dataset, of which nothing is read yet."""
    source: Source = make("dataset", config.dataset)
    return source


def make_evaluated(config: TrainConfig) -> Source | None:
    """The dataset that the encoder is evaluated on, of which nothing is read yet; None if it is the data of the run."""
    if config.probe.dataset is None:
        return None
    try:
        source: Source = make("dataset", config.probe.dataset)
    except UserError as error:
        raise UserError(f"probe.dataset: {error}") from error
    return source


def make_transfers(config: TrainConfig) -> dict[str, Source]:
    """The datasets of ``probe.transfer`` by name, of which nothing is read yet."""
    return {name: make(f"probe.transfer.{name}", node) for name, node in config.probe.transfer.items()}


def make_protocols(config: TrainConfig) -> dict[str, Protocol]:
    """The evaluation protocols by name, in the order of the table at the end of a run."""
    return {name: make(f"probe.protocols.{name}", node) for name, node in config.probe.protocols.items()}


def make_augment(config: TrainConfig) -> Augment:
    """The augmentation, which makes pairs."""
    augment: Augment = make("augment", config.augment)
    pairs = f"augment.views={augment.views}: a pair needs two views or more; [{{}}, {{}}] makes two of one recipe"
    require(len(augment.views) > 1, pairs)
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
    """The untrained model. Its weights are drawn from torch's global generator.

    With weights from elsewhere it normalizes pixels as these take them, instead of by ``mean`` and ``std``.
    """
    foreign = has_foreign_weights(config)
    channels = len(config.init_mean or IMAGENET[0]) if foreign else len(mean)
    encoder = make("encoder", config.encoder, in_channels=channels, image_size=image_size)
    if foreign:
        mean, std = pixel_statistics(encoder, config.init_mean, config.init_std)
    return Model(encoder, config.projector, mean, std)


@torch.no_grad()
def try_encoder(config: TrainConfig, model: Model, sides: Iterable[int]) -> None:
    """Call the encoder on two images of each size: its first error comes before anything is written.

    Raises:
        UserError: an encoder of scclr takes no such images; the output of another is not [2, feature_dim].
    """
    training, width = model.training, model.encoder.feature_dim
    for side in sides:
        images = torch.zeros(2, model.channels, side, side)
        try:
            h = model.eval().represent(images)
        except (RuntimeError, AssertionError) as error:
            if not is_own("encoder", config.encoder):
                raise
            message = f"the encoder takes no images of {side} x {side} pixels ({one_line(error)})"
            raise UserError(f"{message}; give images of another size, or another encoder") from error
        finally:
            model.train(training)
        message = f"encoder._target_={config.encoder['_target_']}: it gives {list(h.shape)} for 2 images"
        require(list(h.shape) == [2, width], f"{message}, and feature_dim is {width}: give h [B, feature_dim]")


def check_channels(config: TrainConfig, model: Model, trained: int, evaluated: Iterable[int]) -> None:
    """Refuse images whose number of channels the encoder cannot take.

    Args:
        trained: channels of the images to train on.
        evaluated: channels of the images of each dataset to evaluate on. An encoder of colour images takes grey ones,
            and one of grey images takes colour ones.
    """
    takes = model.channels
    whose = "the encoder" if config.init_from is None else f"init_from={config.init_from}"
    trains = bool({"pretrain", "theory"}.intersection(config.stages))
    advice = "; type init_mean and init_std with a number for each" if has_foreign_weights(config) else ""
    for count, convertible in ((trained, not trains), *((count, True) for count in evaluated)):
        fits = count == takes or (convertible and {count, takes} == {1, 3})
        require(fits, f"{whose} takes images of {takes} channels, and these have {count}{advice}")


def make_models(config: TrainConfig, splits: Splits, *evaluated: Splits) -> tuple[Model, Model]:
    """(the model as the run finds it, the same with the untrained weights of its seed).

    Args:
        evaluated: what the encoder is evaluated on, if not ``splits``.
    """
    mean, std, image_size = splits.mean, splits.std, splits.train.images.shape[-1]
    sides = {part.train.images.shape[-1] for part in (splits, *evaluated)}
    foreign = has_foreign_weights(config)
    origin = None if config.init_from is None or foreign else load(config.init_from)
    if origin is not None and "pretrain" not in config.stages:  # an encoder sees pixels as it was trained to
        mean, std = (tuple(origin["model"][name].flatten().tolist()) for name in ("mean", "std"))
        image_size = origin["image_size"]
    model = make_model(config, mean, std, image_size=image_size)
    check_channels(config, model, len(splits.mean), [len(part.mean) for part in evaluated or [splits]])
    try_encoder(config, model, sides)
    untrained = copy.deepcopy(model)
    if origin is not None:
        load_weights(model, origin, f"init_from={config.init_from}")
        if config.pretrain.channels_last:  # as training leaves it, so that evaluating again gives the same bits
            model = model.to(memory_format=torch.channels_last)
    elif foreign:
        note = load_foreign(model.encoder, str(config.init_from))
        if torchrun.is_main():
            shown = [", ".join(f"{value:g}" for value in x.flatten().tolist()) for x in (model.mean, model.std)]
            print(f"{note}; pixels: mean {shown[0]}, std {shown[1]}", file=sys.stderr)
    return model, untrained


def make_foreign(config: TrainConfig) -> Model:
    """The model of a run that evaluates weights from elsewhere, for images of the size that the run's dataset has."""
    side = getattr(make_dataset(config), "image_size", None) or 224
    model = make_model(config, IMAGENET[0], IMAGENET[1], image_size=side)
    load_foreign(model.encoder, str(config.init_from))
    return model


def load_weights(model: Model, checkpoint: dict[str, Any], source: str) -> None:
    """Copy all weights of the checkpoint, which comes from ``source``, into ``model``."""
    load_own(model, checkpoint["model"], source)


def pick_device(name: str) -> torch.device:
    """The device that ``device=<name>`` means; ``auto`` is CUDA if there is any.

    Raises:
        UserError: cuda without CUDA.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device=cuda: PyTorch finds no CUDA device here; type device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

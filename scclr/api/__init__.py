"""Runs from Python: what ``scclr.train``, ``scclr.load`` and ``scclr.results`` do.

Dimensions: N images, C channels, H x W pixels, D features.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scclr.components import load_weights, make_dataset, make_foreign, make_model, prepare
from scclr.config.compose import parse, plan
from scclr.config.errors import did_you_mean, require
from scclr.config.resolve import components, leaves, restore
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.encoders.weights import has_foreign_weights
from scclr.evaluate.features import extract_features
from scclr.run.checkpoint import load as load_checkpoint
from scclr.run.result import named_evaluations, read_evaluations, read_result
from scclr.train import run

EXAMPLE = "; give a folder such as runs/default/<run>"


class Encoder(nn.Module):
    """A copy of the encoder of ``model`` that normalizes pixels itself: images [N, C, H, W] in [0, 1] -> h [N, D].

    ``network`` is the encoder as it was trained, ``mean`` and ``std`` [1, C, 1, 1] are buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.register_buffer("mean", model.mean.clone())
        self.register_buffer("std", model.std.clone())
        self.network = copy.deepcopy(model.encoder)
        self.feature_dim: int = self.network.feature_dim  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        h: Tensor = self.network((images - self.mean) / self.std)
        return h  # [N, D]


class Run:
    """A finished run, read from its folder: what ``scclr.load`` returns.

    Args:
        directory: the run folder.
        trust: packages outside scclr whose components the run may be made of.

    Raises:
        UserError: the folder holds no finished run, or one of an untrusted component; the message says what to give.
    """

    def __init__(self, directory: str | Path, trust: Iterable[str] = ()) -> None:
        self.directory, self.trust = Path(directory), tuple(trust)
        finished = (self.directory / "result.json").is_file()
        hint = did_you_mean(str(directory), map(str, _beside(self.directory))) or EXAMPLE
        require(finished, f"{directory}: no result.json, so no finished run{hint}")
        self.result: dict[str, Any] = read_result(self.directory)
        self.config: TrainConfig = restore(self.result["config"], str(directory), self.trust)

    def __repr__(self) -> str:
        return f"scclr.load({str(self.directory)!r})"

    @property
    def metrics(self) -> dict[str, float]:
        """The final numbers by name, such as ``logreg-v1/top1``. Accuracies are fractions in [0, 1]."""
        return dict(self.result["metrics"])

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """What ``scclr evaluate`` has added, by ``<dataset>-<protocol>-<hash>``: metrics, choices, config.

        Raises:
            UserError: a file of them is damaged.
        """
        return read_evaluations(self.directory)

    @property
    def origin(self) -> str:
        """Where the weights of the run lie: its own folder, or the ``init_from`` that it only evaluates."""
        return str(self.directory if "pretrain" in self.config.stages else self.config.init_from)

    @cached_property
    def _trained(self) -> tuple[Model, int]:
        """(the model, pixels on a side of the images that its encoder was made for)."""
        with torch.random.fork_rng():
            if "pretrain" not in self.config.stages and has_foreign_weights(self.config):
                return make_foreign(self.config).eval(), getattr(make_dataset(self.config), "image_size", None) or 224
            checkpoint = load_checkpoint(self.origin)
            mean, std = (checkpoint["model"][name].flatten().tolist() for name in ("mean", "std"))
            model = make_model(self.config, mean, std, image_size=checkpoint["image_size"])
            load_weights(model, checkpoint, str(self.directory))
        return model.eval(), checkpoint["image_size"]

    @property
    def model(self) -> Model:
        """The trained model on the CPU, in eval mode: float images [N, C, H, W] in [0, 1] -> h [N, D], z [N, P]."""
        return self._trained[0]

    @property
    def image_size(self) -> int:
        """Pixels on a side of the images that the encoder was made for."""
        return self._trained[1]

    @cached_property
    def encoder(self) -> "Encoder":
        """The encoder alone, with the normalization of pixels: float images [N, C, H, W] in [0, 1] -> h [N, D].

        It is a copy of the one in ``model``, in eval mode on the CPU: to train or to move it changes nothing else.
        """
        return Encoder(self.model).eval()

    def features(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """h [N, D] of images [N, C, H, W], in float32 on the device of the images.

        Args:
            images: uint8, or floats in [0, 1]. Grey images may be given to an encoder of colour images.

        Raises:
            ValueError: another type or shape.
        """
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}: give uint8 or floats [N, C, H, W]")
        pixels = images if images.dtype == torch.uint8 else images * 255
        labels = torch.full((len(images),), -1, device=images.device)
        return extract_features(self.model.to(images.device), ImageSet(pixels, labels), batch_size)


def _beside(directory: Path) -> Iterator[Path]:
    """The folders of finished runs in ``directory`` and beside it."""
    for folder in (directory, directory.parent):
        yield from sorted(path.parent for path in folder.glob("*/result.json"))


def results(directory: str | Path) -> list[dict[str, Any]]:
    """See ``scclr.results``."""
    folder = Path(directory)
    paths = sorted(path.parent for path in folder.glob("**/result.json"))
    require(len(paths) > 0, f"{folder}: no finished runs; give a folder such as runs or runs/default")
    added = named_evaluations([read_evaluations(path) for path in paths])
    return [_row(path) | evaluations for path, evaluations in zip(paths, added, strict=True)]


def _row(directory: Path) -> dict[str, Any]:
    result = read_result(directory)
    loss = str(result["config"]["loss"]["_target_"])
    named = {"directory": str(directory), "group": result["group"], "loss": loss.rsplit(".", 1)[1]}
    seconds = {f"seconds.{name}": value for name, value in result["seconds"].items()}
    return {**named, **leaves(result["config"]), **result["metrics"], **seconds}


def train(*words: str) -> Run:
    """See ``scclr.train``."""
    command = parse(words)
    one = not command.sweep and not command.shows_only
    require(one, f"{' '.join(command.flags)}: scclr.train does one run; loop over values in Python, one call for each")
    (point,) = plan(command).points
    with torch.random.fork_rng():  # a run seeds torch's generators
        config, identity = prepare(point.config, point.overrides)
        run(config, identity)
    targets = [node["_target_"] for _, node in components(asdict(config))]  # of words typed here
    return Run(identity.directory, trust=targets)

"""Runs from Python: what ``scclr.train``, ``scclr.load`` and ``scclr.results`` do.

Dimensions: N images, C channels, H x W pixels, D features.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scclr.components import load_weights, make_foreign, make_model, prepare
from scclr.config.compose import parse, plan
from scclr.config.errors import require
from scclr.config.resolve import leaves, restore
from scclr.config.schema import COMPONENTS, TrainConfig
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.encoders.weights import has_foreign_weights
from scclr.evaluate.features import extract_features
from scclr.run.checkpoint import load as load_checkpoint
from scclr.run.result import read_result
from scclr.train import run


class Run:
    """A finished run, read from its folder: what ``scclr.load`` returns.

    Args:
        directory: the run folder.
        trust: packages outside scclr whose components the run may be made of.

    Raises:
        UserError: the folder holds no finished run, or one of an untrusted component; the message says what to give.
    """

    def __init__(self, directory: str | Path, trust: Iterable[str] = ()) -> None:
        self.directory = Path(directory)
        finished = (self.directory / "result.json").is_file()
        require(finished, f"{directory}: no result.json, so no finished run; give a folder such as runs/default/<run>")
        self.result: dict[str, Any] = read_result(self.directory)
        self.config: TrainConfig = restore(self.result["config"], str(directory), trust)

    def __repr__(self) -> str:
        return f"scclr.load({str(self.directory)!r})"

    @property
    def metrics(self) -> dict[str, float]:
        """The final numbers by name, such as ``probe/logreg/top1``. Accuracies are fractions in [0, 1]."""
        return dict(self.result["metrics"])

    @cached_property
    def model(self) -> Model:
        """The trained model on the CPU, in eval mode: float images [N, C, H, W] in [0, 1] -> h [N, D], z [N, P]."""
        if "pretrain" not in self.config.stages and has_foreign_weights(self.config):
            with torch.random.fork_rng():
                return make_foreign(self.config).eval()
        own = self.directory if "pretrain" in self.config.stages else None
        checkpoint = load_checkpoint(own or str(self.config.init_from))
        mean, std = (checkpoint["model"][name].flatten().tolist() for name in ("mean", "std"))
        with torch.random.fork_rng():
            model = make_model(self.config, mean, std, image_size=checkpoint["image_size"])
        load_weights(model, checkpoint, str(self.directory))
        return model.eval()

    @property
    def encoder(self) -> nn.Module:
        """The encoder alone. It takes pixels after ``(x - model.mean) / model.std``, [N, C, H, W] -> h [N, D]."""
        return self.model.encoder

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


def results(directory: str | Path) -> list[dict[str, Any]]:
    """See ``scclr.results``."""
    folder = Path(directory)
    paths = sorted(path.parent for path in folder.glob("**/result.json"))
    require(len(paths) > 0, f"{folder}: no finished runs; give a folder such as runs or runs/default")
    return [_row(path) for path in paths]


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
    targets = [getattr(config, group)["_target_"] for group in COMPONENTS]  # of words typed here
    return Run(identity.directory, trust=targets)

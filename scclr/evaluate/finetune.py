"""Fine-tuning: a copy of the encoder is trained end to end with a linear layer on top, on all labels or a share.

Dimensions: N images, B of a step in this process, C channels, S pixels on a side, D features, K classes.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR

from scclr.augment import with_channels
from scclr.config.errors import require
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.evaluate.crops import Steps, crop_and_flip, crops, known_images, labelled_share, scaled_rates
from scclr.evaluate.features import extract_layers, own_share
from scclr.evaluate.logreg import accuracy
from scclr.evaluate.protocol import Features, Outcome, Protocol, require_grid, require_number
from scclr.evaluate.scores import Tally
from scclr.run import distributed
from scclr.run.machine import if_memory_lacks

MOMENTUM = 0.9
LESS_MEMORY = "type a smaller batch_size of this protocol: probe.protocols.<name>.batch_size=..."


class FineTune(Protocol):
    """Fine-tuning with SimCLR's settings (Chen et al. 2020, app. B.5 and B.8): SGD with Nesterov momentum 0.9, a cosine
    schedule without warm-up, no weight decay, random crops and flips.

    This is not a measure of frozen features: the encoder adapts to the labels. It works on copies, and the encoder of
    the run stays as it is. Each learning rate is trained from the pretrained weights and a linear layer of zeros. The
    validation split chooses one, of equally good ones the lowest. With this a copy is trained again on training and
    validation images, if ``splits.refit``, and tested once.

    Args:
        lr: learning rates at the start, for a batch of 256 images; they are multiplied by batch_size / 256.
        epochs: passes over the images. Those beyond the last full batch of an epoch are left out of it.
        batch_size: images in a step, over all processes; at most as many as there are.
        share: of the images of each class whose labels are trained on, one image at least. The choice sees all of the
            validation split.
        crop_scale: least and greatest area of a crop, divided by the image's.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: an argument out of range.
    """

    baselines = False  # raw pixels have no encoder

    def __init__(
        self, *, lr: list[float], epochs: int, batch_size: int, share: float, crop_scale: list[float], flip: float
    ) -> None:
        require_grid("lr", lr, 1e-6, 100)
        require_number("epochs", epochs, 1, 10**6)
        require_number("batch_size", batch_size, 2, 10**6)
        require_number("share", share, 1e-6, 1)
        self.lr, self.epochs, self.batch_size = sorted(lr), epochs, batch_size
        self.share, self.crop = share, crop_and_flip(crop_scale, flip)

    @if_memory_lacks(LESS_MEMORY)
    def __call__(self, features: Features) -> Outcome:
        splits = features.splits
        data = labelled_share(splits.train, self.share, features.seed)
        best, right = None, -1.0
        for lr in self.lr:
            tuned = self.train(features, data, lr)
            found = accuracy(tuned.scores(splits.validation, features.batch_size).argmax(1), features.validation[1])
            if found > right:
                best, rate, right = tuned, lr, found
        assert best is not None
        if splits.refit:
            data = labelled_share(known_images(splits, 2), self.share, features.seed)
            best = self.train(features, data, rate)
        finite = all(bool(weights.isfinite().all()) for weights in best.parameters())
        require(finite, f"fine-tuning diverged at lr={rate:g}: type smaller ones, probe.protocols.<name>.lr=[...]")
        tally = Tally(features.classes, features.test[1].device)
        tally.add(best.scores(splits.test, features.batch_size), features.test[1])
        return Outcome(tally.metrics(splits), right, {"lr": rate, "images": len(data)}, tally.confusion)

    def train(self, features: Features, data: ImageSet, lr: float) -> "Classifier":
        """A copy of the encoder with a linear layer, trained on ``data`` by all processes together."""
        assert features.model is not None
        steps = Steps.of(len(data), self.batch_size, self.epochs)
        tuned = Classifier(features.model, features.layer, features.classes).train()
        tuned = tuned.to(memory_format=torch.channels_last)  # as the crops are
        for module in tuned.modules():
            if isinstance(module, _BatchNorm) and module.momentum is not None:
                module.momentum = min(0.1, 10 / steps.per_epoch)  # SimCLR, app. B.8.2; there it is 1 - this
        network = distributed.replicate(tuned)
        (rate,) = scaled_rates([lr], steps)
        optimizer = torch.optim.SGD(tuned.parameters(), rate, momentum=MOMENTUM, nesterov=True)
        schedule = CosineAnnealingLR(optimizer, steps.total)
        for images, labels in crops(data, self.crop, steps, features.seed, f"fine-tuning, lr={lr:g}"):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
        return tuned


class Classifier(nn.Module):
    """A copy of ``model`` with a linear layer of zeros on its ``layer``, ``h`` or ``z``."""

    def __init__(self, model: Model, layer: str, classes: int) -> None:
        super().__init__()
        self.layer, width = layer, model.width(layer)
        self.model = copy.deepcopy(model)
        if layer == "h":
            self.model.projector = nn.Sequential()  # it would have no gradient
        self.head = nn.Linear(width, classes, device=model.mean.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, K] of floats [B, C, S, S] in [0, 1]."""
        images = with_channels(images, self.model.channels)
        scores: Tensor = self.head(self.model.represent(images) if self.layer == "h" else self.model(images)[1])
        return scores

    @torch.no_grad()
    def scores(self, data: ImageSet, batch_size: int) -> Tensor:
        """Scores [N, K] of this process's share of ``data``, of images as they are, in eval mode."""
        x = extract_layers(self.model, own_share(data), batch_size, [self.layer])[self.layer]
        scores: Tensor = self.head(x)
        return scores

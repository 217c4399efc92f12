"""Linear evaluation as papers do it: a linear layer on the features of the frozen encoder, trained by SGD.

Dimensions: N images, G of them in a step, B of these in this process, D features, K classes, L learning rates.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.datasets.loader import epoch_order
from scclr.evaluate.crops import Steps, crop_and_flip, crops, known_images, represent, scaled_rates
from scclr.evaluate.protocol import Features, Outcome, Part, Protocol, require_grid, require_number
from scclr.evaluate.scores import Tally
from scclr.run import distributed

MOMENTUM = 0.9
BLOCK = 4096  # images whose scores are in memory at once


class SGD(Protocol):
    """A linear layer trained by SGD with momentum 0.9, a cosine schedule and no weight decay (SimCLR, app. B.6).

    All learning rates are trained side by side on the same batches. The validation split chooses one, of equally good
    ones the lowest. With this the layer is trained again on training and validation images, if ``splits.refit``, and
    tested once on images that are not augmented. Weights start at 0. The encoder stays in eval mode.

    Args:
        lr: learning rates at the start, for a batch of 256 images; they are multiplied by batch_size / 256.
        epochs: passes over the images. Those beyond the last full batch of an epoch are left out of it.
        batch_size: images in a step, over all processes; at most as many as there are.
        augment: train on a new random crop and flip of each image in every epoch, which the encoder sees each time;
            false trains on the features of the images as they are.
        crop_scale: least and greatest area of a crop, divided by the image's.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: an argument out of range.
    """

    baselines = False  # logistic regression has them, at a small part of the cost

    def __init__(
        self, *, lr: list[float], epochs: int, batch_size: int, augment: bool, crop_scale: list[float], flip: float
    ) -> None:
        require_grid("lr", lr, 1e-6, 1e4)
        require_number("epochs", epochs, 1, 10**6)
        require_number("batch_size", batch_size, 1, 10**6)
        self.lr, self.epochs, self.batch_size = sorted(lr), epochs, batch_size
        self.augment, self.crop = augment, crop_and_flip(crop_scale, flip)

    def __call__(self, features: Features) -> Outcome:
        layers = self.train(features, [features.train], self.lr)
        x, y = features.validation
        counts = torch.zeros(len(self.lr) + 1, dtype=torch.int64, device=y.device)
        for some, labels in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
            counts[:-1] += (scores(some, layers).argmax(2) == labels.unsqueeze(1)).sum(0)
        counts[-1] = len(y)
        *right, images = distributed.all_reduce_sum(counts).tolist()
        best = right.index(max(right))
        lr, chosen = self.lr[best], layers[best : best + 1]
        if len(features.known) > 1:
            chosen = self.train(features, features.known, [lr])
        tally = Tally(features.classes, y.device)
        for some, labels in zip(*(part.split(BLOCK) for part in features.test), strict=True):
            tally.add(scores(some, chosen).squeeze(1), labels)
        return Outcome(tally.metrics(features.splits), right[best] / images, {"lr": lr}, tally.confusion)

    def train(self, features: Features, parts: Sequence[Part], lr: Sequence[float]) -> Tensor:
        """The weights [L, K, D + 1] after the last step, a layer for each learning rate; the bias is the last column.

        Args:
            parts: ``[features.train]`` or ``features.known``, of which the images are trained on.
        """
        sets = [features.splits.train, features.splits.validation][: len(parts)]
        steps = Steps.of(sum(map(len, sets)), self.batch_size, self.epochs)
        if self.augment:
            batches = self._of_crops(features, len(parts), steps)
        else:
            batches = held_rows(parts, list(map(len, sets)), steps, features.seed)
        weights = features.train[0].new_zeros(len(lr), features.classes, features.train[0].shape[1] + 1)
        rates, velocity = weights.new_tensor(scaled_rates(lr, steps)).view(-1, 1, 1), torch.zeros_like(weights)
        for step, (x, y) in enumerate(batches):
            gradient = distributed.all_reduce_sum(summed_gradient(weights, x, y)) / steps.batch_size
            velocity.mul_(MOMENTUM).add_(gradient)
            weights -= rates * velocity * (0.5 * (1 + math.cos(math.pi * step / steps.total)))
        return weights

    def _of_crops(self, features: Features, parts: int, steps: Steps) -> Iterator[Part]:
        """The features of each step's crops in this process [B, D], and their labels [B]."""
        assert features.model is not None
        data = known_images(features.splits, parts)
        for images, labels in crops(data, self.crop, steps, features.seed, "linear evaluation"):
            yield represent(features.model, images, features.layer), labels


def held_rows(parts: Sequence[Part], sizes: Sequence[int], steps: Steps, seed: int) -> Iterator[Part]:
    """Of each step's images the features [B, D] and labels [B] of those that this process holds, which may be none.

    Args:
        parts: what this process holds of each set.
        sizes: images of these sets in all processes.
    """
    starts, begin = [], 0
    for size in sizes:
        starts.append(begin + distributed.rank() * -(-size // distributed.world_size()))  # as ``own_share``
        begin += size
    for step in range(steps.total):
        epoch, position = divmod(step, steps.per_epoch)
        order = epoch_order(seed, epoch, begin)[position * steps.batch_size :][: steps.batch_size]
        found = []
        for (x, y), start in zip(parts, starts, strict=True):
            rows = order[(order >= start) & (order < start + len(y))] - start
            rows = rows.to(y.device, non_blocking=True)
            found.append((x[rows], y[rows]))
        xs, ys = zip(*found, strict=True)
        yield torch.cat(xs), torch.cat(ys)


def scores(x: Tensor, weights: Tensor) -> Tensor:
    """The scores [N, L, K] of features [N, D] by layers of ``weights`` [L, K, D + 1]."""
    return (F.pad(x, (0, 1), value=1.0) @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2])


def summed_gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the sum of the cross-entropies of features ``x`` [B, D] with labels ``y`` [B], for each layer of
    ``weights`` [L, K, D + 1]."""
    p = scores(x, weights).softmax(2)  # [B, L, K]
    p -= F.one_hot(y, p.shape[2]).unsqueeze(1)
    return (p.flatten(1).T @ F.pad(x, (0, 1), value=1.0)).view_as(weights)

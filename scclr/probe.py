"""Evaluation of a frozen encoder: features once, choose on validation, test once.

Dimensions: N images, D features, K classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scclr.config import ProbeConfig
from scclr.datasets import ImageSet, Splits, with_channels
from scclr.distributed import World
from scclr.model import Model

PIXELS = 32  # a side; the baseline on raw pixels sees no more than CIFAR's 3,072 values


@dataclass(frozen=True)
class ProbeResult:
    """Fractions in [0, 1] by metric name, the L2 strength chosen on validation, and the hash of the frozen encoder."""

    metrics: dict[str, float]
    l2: float
    encoder_sha256: str | None = None


def encoder_hash(encoder: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def features(model: Model, data: ImageSet, batch_size: int, world: World = World()) -> Tensor:  # noqa: B008
    """h [N, D] in float32 of un-augmented images, the model in eval mode; its mode is restored.

    Every process of ``world`` computes its share, and all of them have the whole.
    """
    training = model.training
    model.eval()
    rows = -(-len(data) // world.size)
    own = data[slice(world.rank * rows, (world.rank + 1) * rows)]
    parts = (with_channels(part, model.channels).float() / 255 for part in own.blocks(batch_size))
    h = torch.cat([model.represent(part).float() for part in parts])
    h = world.gather(F.pad(h, (0, 0, 0, rows - len(h))))[: len(data)]  # equal shares, the last one filled up
    model.train(training)
    return h


def evaluated(model: Model, splits: Splits, config: ProbeConfig, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the training, validation and test images."""
    train, validation, test = (
        features(model, part, config.batch_size, world) for part in (splits.train, splits.validation, splits.test)
    )
    return train, validation, test


def pixels(data: ImageSet) -> Tensor:
    """The images themselves as features, in [0, 1], [N, C H W]; above 32 pixels a side averaged down to 32 x 32."""
    parts = (part.float() / 255 for part in data.blocks(512))
    if max(data.images.shape[-2:]) > PIXELS:
        parts = (F.adaptive_avg_pool2d(part, PIXELS) for part in parts)
    return torch.cat([part.flatten(1) for part in parts])


def probe_encoder(model: Model, splits: Splits, config: ProbeConfig, world: World = World()) -> ProbeResult:  # noqa: B008
    """The protocols on the frozen encoder of ``model``; asserts that evaluating did not change it.

    The other processes of ``world`` call ``evaluated`` meanwhile.
    """
    before = encoder_hash(model.encoder)
    result = probe(evaluated(model, splits, config, world), splits, config)
    assert encoder_hash(model.encoder) == before, "evaluation changed the encoder"
    return ProbeResult(result.metrics, result.l2, before)


def probe_pixels(splits: Splits, config: ProbeConfig) -> ProbeResult:
    """The same protocols on raw pixels."""
    return probe((pixels(splits.train), pixels(splits.validation), pixels(splits.test)), splits, config)


def probe(x: tuple[Tensor, Tensor, Tensor], splits: Splits, config: ProbeConfig) -> ProbeResult:
    """Logistic regression and kNN on features ``x`` of the training, validation and test images.

    ``probe/logreg/top1``: features standardised, multinomial logistic regression; the L2 strength is chosen on the
    validation split, the model refitted on training and validation images and tested once. ``knn/k<k>/top1``: see
    ``knn_predict``, with training and validation images as neighbours. Without ``splits.refit`` both are left with the
    training images. Where classes have many, some or few of these, ``.../top1/many``, ``/medium`` and ``/few`` are the
    means of the per-class accuracies of those classes (Liu et al. 2019, sec. 4).
    """
    train, validation, test = x
    y, y_validation, y_test = (part.labels for part in (splits.train, splits.validation, splits.test))
    classes = len(splits.classes)
    l2 = choose_l2(train, y, validation, y_validation, classes, config.l2, config.max_iter)
    if splits.refit:
        train, y = torch.cat([train, validation]), torch.cat([y, y_validation])
    axes = PrincipalAxes(train)
    fit = fit_logreg(axes(train), y, classes, l2, config.max_iter)
    k, temperature = config.knn_k, config.knn_temperature
    predicted = {
        "probe/logreg/top1": logits(axes(test), fit).argmax(1),
        f"knn/k{k}/top1": knn_predict(train, y, test, classes, k=k, temperature=temperature),
    }
    metrics = {name: accuracy(classified, y_test) for name, classified in predicted.items()}
    for group, members in splits.groups.items():
        for name, classified in predicted.items():
            own = class_accuracy(classified, y_test, classes)[members]
            metrics[f"{name}/{group}"] = own.nanmean().item()
    return ProbeResult(metrics, l2)


class PrincipalAxes:
    """(x - mean) / std by the statistics of ``x`` [N, D], in float64, rotated to its principal axes.

    A rotation changes neither the penalty nor the fit; uncorrelated axes are what makes ``fit_logreg`` fast. Constant
    features become 0.
    """

    def __init__(self, x: Tensor) -> None:
        x = x.double()
        self.mean, std = x.mean(0), x.std(0, correction=0)
        self.scale = torch.where(std > 1e-12, 1 / std.clamp_min(1e-12), 0.0)
        standard = (x - self.mean) * self.scale
        self.axes = torch.linalg.eigh(standard.T @ standard / len(x)).eigenvectors  # [D, D]

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) * self.scale) @ self.axes


def choose_l2(
    x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor, classes: int, l2: Sequence[float], max_iter: int
) -> float:
    """The strength of the best validation accuracy; of equals the strongest. Each fit starts from the last one's."""
    axes = PrincipalAxes(x)
    x, x_validation = axes(x), axes(x_validation)
    best, chosen, fit = -1.0, 0.0, None
    for strength in sorted(l2, reverse=True):
        fit = fit_logreg(x, y, classes, strength, max_iter, fit)
        accuracy = top1(x_validation, y_validation, fit)
        if accuracy > best:
            best, chosen = accuracy, strength
    return chosen


def fit_logreg(x: Tensor, y: Tensor, classes: int, l2: float, max_iter: int, start: Tensor | None = None) -> Tensor:
    """Minimise ``mean cross-entropy + l2/2 |W|^2`` by L-BFGS; the bias, the last column, is not penalised.

    The search runs in ``V = W / step``, ``step = (var(x) / 4 + l2)^-1/2``, a bound on the curvature along each feature:
    the minimum is the same, and with uncorrelated features it takes some tens of iterations instead of hundreds.

    Args:
        x: float64 [N, D]; y: int64 [N].
        start: a solution to start from instead of zero.

    Returns:
        [K, D + 1]. In scikit-learn's terms l2 is 1 / (C N).
    """
    step = torch.cat([(x.var(0, correction=0) / 4 + l2).rsqrt(), x.new_ones(1)])  # [D + 1]
    scaled = torch.zeros(classes, len(step), dtype=x.dtype, device=x.device) if start is None else start / step
    scaled.requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weights = scaled * step
        value = F.cross_entropy(logits(x, weights), y) + l2 / 2 * weights[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(objective)
    return (scaled * step).detach()


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """x [N, D] by linear ``weights`` [K, D + 1], [N, K]."""
    return F.linear(x, weights[:, :-1], weights[:, -1])


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """The share of ``predicted`` [N] that is ``y`` [N]."""
    return (predicted == y).double().mean().item()


def class_accuracy(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """``accuracy`` on the images of each class, float64 [K]; NaN for a class without any."""
    hits, images = (torch.bincount(labels, minlength=classes) for labels in (y[predicted == y], y))
    return hits.double() / images


def top1(x: Tensor, y: Tensor, weights: Tensor) -> float:
    """Accuracy of linear ``weights`` [K, D + 1] on x [N, D]."""
    return accuracy(logits(x, weights).argmax(1), y)


def knn_top1(
    bank: Tensor, y_bank: Tensor, queries: Tensor, y: Tensor, classes: int, *, k: int, temperature: float
) -> float:
    """Accuracy of ``knn_predict`` on ``queries``."""
    return accuracy(knn_predict(bank, y_bank, queries, classes, k=k, temperature=temperature), y)


@torch.no_grad()
def knn_predict(bank: Tensor, y_bank: Tensor, queries: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """Classes [Q] by the k nearest of ``bank`` in cosine, votes weighted exp(cosine / temperature) (Wu et al. 2018)."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predicted = []
    for part in queries.split(1024):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [1024, k]
        votes = torch.zeros(len(part), classes, dtype=bank.dtype, device=bank.device)
        votes.scatter_add_(1, y_bank[nearest], (cosine / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)

"""The evaluation of a run: choose on the validation split, test once.

Dimensions: N images, D features, K classes. Several processes hold a share of the features each.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scclr.config.schema import ProbeConfig
from scclr.datasets import ImageSet, Splits
from scclr.encoders.model import Model
from scclr.evaluate.features import encoder_hash, extract_features, own_share, pixels
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.logreg import Part, accuracy, choose_l2, fit_logreg, predict
from scclr.run import distributed

MOST_PIXELS = 200_000  # images; the baseline on raw pixels is left out beyond


@dataclass(frozen=True)
class ProbeResult:
    """The numbers of one set of features."""

    metrics: dict[str, float]  # accuracies on the test split as fractions in [0, 1]
    l2: float  # the strength that the validation split chose
    validation: float  # its accuracy there
    gradient: float  # the greatest entry of the gradient at which the tested fit stopped
    encoder_sha256: str | None = None  # of the frozen encoder


def evaluate(model: Model, untrained: Model, splits: Splits, config: ProbeConfig) -> dict[str, Any]:
    """What ``result.json`` holds of the protocols on the encoder, on the same encoder untrained, and on raw pixels."""
    found = {
        "": probe_encoder(model, splits, config),
        "baseline/untrained/": probe_encoder(untrained, splits, config),
        "baseline/pixels/": probe_pixels(splits, config),
    }
    results = {prefix: result for prefix, result in found.items() if result is not None}
    return {
        "metrics": {prefix + name: value for prefix, r in results.items() for name, value in r.metrics.items()},
        "validation": {prefix + "probe/logreg": r.validation for prefix, r in results.items()},
        "l2": {prefix + "probe/logreg": r.l2 for prefix, r in results.items()},
        "gradient": {prefix + "probe/logreg": r.gradient for prefix, r in results.items()},
        "left_out": dict.fromkeys(found.keys() - results.keys(), f"over {MOST_PIXELS:,} images"),
        "encoder_sha256": results[""].encoder_sha256,
    }


def probe_encoder(model: Model, splits: Splits, config: ProbeConfig) -> ProbeResult:
    """The protocols on the frozen encoder of ``model``. Asserts that the evaluation did not change it."""
    before = encoder_hash(model.encoder)
    train, validation, test = (
        _part(part, extract_features(model, part, config.batch_size))
        for part in map(own_share, (splits.train, splits.validation, splits.test))
    )
    result = probe(train, validation, test, splits, config)
    assert encoder_hash(model.encoder) == before, "evaluation changed the encoder"
    return replace(result, encoder_sha256=before)


def probe_pixels(splits: Splits, config: ProbeConfig) -> ProbeResult | None:
    """The same protocols on raw pixels; None beyond 200,000 training images, where nobody learns from them."""
    if len(splits.train) > MOST_PIXELS:
        return None
    parts = (own_share(part) for part in (splits.train, splits.validation, splits.test))
    train, validation, test = (_part(part, pixels(part)) for part in parts)
    return probe(train, validation, test, splits, config)


def _part(data: ImageSet, x: Tensor) -> Part:
    return x, data.labels


def probe(train: Part, validation: Part, test: Part, splits: Splits, config: ProbeConfig) -> ProbeResult:
    """Logistic regression and kNN on the features and labels of training, validation and test images.

    ``probe/logreg/top1``: multinomial logistic regression on standardized features. The L2 strength is chosen on the
    validation split; then the model is fitted again on training and validation images, and tested once.
    ``knn/k<k>/top1``: ``knn_predict`` with training and validation images as neighbours. Unless ``splits.refit``, both
    use the training images only. If the training images are a long tail, ``.../top1/many``, ``/medium`` and ``/few``
    are the means of the per-class accuracies over classes of that size (Liu et al. 2019, sec. 4).

    Memory: besides the features, what ``fit_logreg`` and ``knn_predict`` name. Nothing of their size is copied.
    """
    classes, (x, y) = len(splits.classes), test
    choice = choose_l2(train, validation, classes, config.l2, config.max_iter)
    known = [train, validation] if splits.refit else [train]
    fit = fit_logreg(known, classes, choice.l2, config.max_iter, choice.fit.weights)
    images = len(splits.train) + (len(splits.validation) if splits.refit else 0)
    k = min(config.knn_k, images)  # the name of the metric says how many voted
    predicted = {
        "probe/logreg/top1": predict(x, fit.weights),
        f"knn/k{k}/top1": knn_predict(known, x, classes, k=k, temperature=config.knn_temperature),
    }
    metrics = {name: accuracy(labels, y) for name, labels in predicted.items()}
    for group, members in splits.groups.items():
        for name, labels in predicted.items():
            metrics[f"{name}/{group}"] = class_accuracy(labels, y, classes)[members].nanmean().item()
    return ProbeResult(metrics, choice.l2, choice.validation, fit.gradient)


def knn_accuracy(model: Model, splits: Splits, config: ProbeConfig, images: int) -> float:
    """kNN accuracy on the validation split, with the first ``images`` training images as neighbours."""
    bank, queries = own_share(splits.train[slice(0, images)]), own_share(splits.validation)
    known = [_part(bank, extract_features(model, bank, config.batch_size))]
    features = extract_features(model, queries, config.batch_size)
    k = min(config.knn_k, len(splits.train), images)
    predicted = knn_predict(known, features, len(splits.classes), k=k, temperature=config.knn_temperature)
    return accuracy(predicted, queries.labels)


def class_accuracy(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """``accuracy`` on the images of each class, float64 [K]; NaN for a class without images."""
    counts = torch.stack([torch.bincount(labels, minlength=classes) for labels in (y[predicted == y], y)])
    hits, images = distributed.all_reduce_sum(counts)
    return hits.double() / images

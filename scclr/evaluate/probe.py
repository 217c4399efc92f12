"""The evaluation of a run: choose on the validation split, test once.

Dimensions: N images, D features, K classes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scclr.config.schema import ProbeConfig
from scclr.datasets import Splits
from scclr.encoders.model import Model
from scclr.evaluate.features import encoder_hash, extract_features, pixels
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.logreg import PrincipalAxes, accuracy, choose_l2, fit_logreg, logits


@dataclass(frozen=True)
class ProbeResult:
    """The numbers of one set of features."""

    metrics: dict[str, float]  # accuracies on the test split as fractions in [0, 1]
    l2: float  # the strength that the validation split chose
    validation: float  # its accuracy there
    encoder_sha256: str | None = None  # of the frozen encoder


def probe_encoder(model: Model, splits: Splits, config: ProbeConfig) -> ProbeResult:
    """The protocols on the frozen encoder of ``model``. Asserts that the evaluation did not change it."""
    before = encoder_hash(model.encoder)
    train, validation, test = (
        extract_features(model, part, config.batch_size) for part in (splits.train, splits.validation, splits.test)
    )
    result = probe((train, validation, test), splits, config)
    assert encoder_hash(model.encoder) == before, "evaluation changed the encoder"
    return replace(result, encoder_sha256=before)


def probe_pixels(splits: Splits, config: ProbeConfig) -> ProbeResult:
    """The same protocols on raw pixels."""
    return probe((pixels(splits.train), pixels(splits.validation), pixels(splits.test)), splits, config)


def probe(features: tuple[Tensor, Tensor, Tensor], splits: Splits, config: ProbeConfig) -> ProbeResult:
    """Logistic regression and kNN on the features of the training, validation and test images.

    ``probe/logreg/top1``: multinomial logistic regression on standardized features. The L2 strength is chosen on the
    validation split; then the model is fitted again on training and validation images, and tested once.
    ``knn/k<k>/top1``: ``knn_predict`` with training and validation images as neighbours. Unless ``splits.refit``, both
    use the training images only. If the training images are a long tail, ``.../top1/many``, ``/medium`` and ``/few``
    are the means of the per-class accuracies over classes of that size (Liu et al. 2019, sec. 4).
    """
    train, validation, test = features
    y, y_validation, y_test = (part.labels for part in (splits.train, splits.validation, splits.test))
    classes = len(splits.classes)
    l2, chosen_by = choose_l2((train, y), (validation, y_validation), classes, config.l2, config.max_iter)
    if splits.refit:
        train, y = torch.cat([train, validation]), torch.cat([y, y_validation])
    axes = PrincipalAxes(train)
    fit = fit_logreg(axes(train), y, classes, l2, config.max_iter)
    k = min(config.knn_k, len(train))  # the name of the metric says how many voted
    predicted = {
        "probe/logreg/top1": logits(axes(test), fit).argmax(1),
        f"knn/k{k}/top1": knn_predict(train, y, test, classes, k=k, temperature=config.knn_temperature),
    }
    metrics = {name: accuracy(labels, y_test) for name, labels in predicted.items()}
    for group, members in splits.groups.items():
        for name, labels in predicted.items():
            metrics[f"{name}/{group}"] = class_accuracy(labels, y_test, classes)[members].nanmean().item()
    return ProbeResult(metrics, l2, chosen_by)


def knn_accuracy(model: Model, splits: Splits, config: ProbeConfig, images: int) -> float:
    """kNN accuracy on the validation split, with the first ``images`` training images as neighbours."""
    few = splits.train[slice(0, images)]
    bank, queries = (extract_features(model, part, config.batch_size) for part in (few, splits.validation))
    k, temperature = config.knn_k, config.knn_temperature
    predicted = knn_predict(bank, few.labels, queries, len(splits.classes), k=k, temperature=temperature)
    return accuracy(predicted, splits.validation.labels)


def class_accuracy(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """``accuracy`` on the images of each class, float64 [K]; NaN for a class without images."""
    hits, images = (torch.bincount(labels, minlength=classes) for labels in (y[predicted == y], y))
    return hits.double() / images

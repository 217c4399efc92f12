"""The evaluation of a run: features are computed once, and every protocol chooses on the validation split, tests once.

Several processes hold a share of the features each.
"""

from collections.abc import Mapping
from typing import Any

from scclr.config.schema import PretrainConfig, ProbeConfig
from scclr.datasets import Splits
from scclr.encoders.model import Model
from scclr.evaluate.features import encoder_hash, extract_features, extract_layers, own_share, pixels
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.logreg import accuracy
from scclr.evaluate.protocol import Features, Outcome, Protocol

MOST_PIXELS = 200_000  # images; the baseline on raw pixels is left out beyond
UNTRAINED, PIXELS = "baseline/untrained/", "baseline/pixels/"


def evaluate(
    model: Model, untrained: Model, splits: Splits, protocols: Mapping[str, Protocol], config: ProbeConfig, seed: int
) -> dict[str, Any]:
    """What ``result.json`` holds of the protocols on the encoder, on the same encoder untrained, and on raw pixels.

    Args:
        protocols: by name. The metric ``top1`` of ``knn`` is called ``knn-v1/top1``, after its version; of the features
            ``z`` it is ``z/knn-v1/top1``.
        seed: of the protocols' own draws.

    Returns:
        ``metrics``, ``validation``, ``chosen`` and ``confusion`` by these names; ``left_out``, the baselines that are
        not there and why; ``encoder_sha256``, the hash of the encoder, which the evaluation did not change.
    """
    before = encoder_hash(model.encoder)
    found = probe_encoder(model, splits, protocols, config, seed)
    assert encoder_hash(model.encoder) == before, "evaluation changed the encoder"
    left_out = {}
    if compared := {name: protocol for name, protocol in protocols.items() if protocol.baselines}:
        outcomes = probe_encoder(untrained, splits, compared, config, seed)
        found |= {UNTRAINED + name: outcome for name, outcome in outcomes.items()}
        if len(splits.train) <= MOST_PIXELS:
            outcomes = probe_pixels(splits, compared, config, seed)
            found |= {PIXELS + name: outcome for name, outcome in outcomes.items()}
        else:
            left_out[PIXELS] = f"over {MOST_PIXELS:,} images"  # where nobody learns from them
    return {
        "metrics": {f"{name}/{metric}": value for name, one in found.items() for metric, value in one.metrics.items()},
        "validation": {name: one.validation for name, one in found.items() if one.validation is not None},
        "chosen": {name: dict(one.chosen) for name, one in found.items() if one.chosen},
        "confusion": {name: one.confusion.cpu().numpy() for name, one in found.items() if one.confusion is not None},
        "left_out": left_out,
        "encoder_sha256": before,
    }


def evaluate_each(
    model: Model,
    untrained: Model,
    data: Mapping[str, Splits],
    protocols: Mapping[str, Protocol],
    config: ProbeConfig,
    seed: int,
) -> dict[str, Any]:
    """``evaluate`` on several datasets, one after the other on the model's device.

    Args:
        data: by the word that comes before their metrics, as in ``mnist/knn-v1/top1``; "" for none.
    """
    merged: dict[str, Any] = {}
    for name, splits in data.items():
        found = evaluate(model, untrained, splits.to(model.mean.device), protocols, config, seed)
        prefix = f"{name}/" if name else ""
        merged["encoder_sha256"] = found.pop("encoder_sha256")
        for part, values in found.items():
            merged.setdefault(part, {}).update({prefix + key: value for key, value in values.items()})
    return merged


def probe_encoder(
    model: Model, splits: Splits, protocols: Mapping[str, Protocol], config: ProbeConfig, seed: int
) -> dict[str, Outcome]:
    """The protocols on the layers of ``model``, frozen, that ``probe.layers`` names."""
    parts = [own_share(part) for part in (splits.train, splits.validation, splits.test)]
    extracted = [extract_layers(model, part, config.batch_size, config.layers) for part in parts]
    found: dict[str, Outcome] = {}
    for layer in config.layers:
        train, validation, test = ((x.pop(layer), part.labels) for x, part in zip(extracted, parts, strict=True))
        features = Features(train, validation, test, splits, model, layer, config.batch_size, seed)
        prefix = "" if layer == "h" else f"{layer}/"
        found |= {prefix + name: outcome for name, outcome in probe(features, protocols).items()}
    return found


def probe_pixels(
    splits: Splits, protocols: Mapping[str, Protocol], config: ProbeConfig, seed: int
) -> dict[str, Outcome]:
    """The same protocols on raw pixels."""
    parts = (own_share(part) for part in (splits.train, splits.validation, splits.test))
    train, validation, test = ((pixels(part), part.labels) for part in parts)
    return probe(Features(train, validation, test, splits, batch_size=config.batch_size, seed=seed), protocols)


def probe(features: Features, protocols: Mapping[str, Protocol]) -> dict[str, Outcome]:
    """What each protocol finds, by its name and version. Nothing of the features' size is copied by this function."""
    return {f"{name}-v{protocol.version}": protocol(features) for name, protocol in protocols.items()}


def knn_accuracy(model: Model, splits: Splits, config: PretrainConfig, batch_size: int) -> float:
    """kNN accuracy on the validation split, with the first ``knn_images`` training images as neighbours."""
    bank, queries = (own_share(part) for part in (splits.train[slice(0, config.knn_images)], splits.validation))
    known, features = ((extract_features(model, part, batch_size), part.labels) for part in (bank, queries))
    k = min(config.knn_k, len(splits.train), config.knn_images)
    predicted = knn_predict([known], features[0], len(splits.classes), k=k, temperature=config.knn_temperature)
    return accuracy(predicted, queries.labels)

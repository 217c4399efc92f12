"""The evaluation protocols against scikit-learn and naive transcriptions, and the encoder they must not touch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from scclr.config.schema import ProbeConfig, ProjectorConfig
from scclr.datasets import ImageSet, Splits
from scclr.encoders.convnet import ConvNet
from scclr.encoders.model import Model
from scclr.evaluate.features import encoder_hash, extract_features, pixels
from scclr.evaluate.knn import knn_predict
from scclr.evaluate.logreg import PrincipalAxes, accuracy, choose_l2, fit_logreg, logits
from scclr.evaluate.probe import probe_encoder, probe_pixels

CONFIG = ProbeConfig(l2=[1e-3, 1e-2], max_iter=50, knn_k=5, knn_temperature=0.1, batch_size=128)


def blobs(n: int = 300, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, n)
    x = draw.normal(size=(classes, dim))[y] + draw.normal(size=(n, dim))
    return torch.from_numpy(x), torch.from_numpy(y)


def top1(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> float:
    return accuracy(logits(x, weights).argmax(1), y)


def splits() -> Splits:
    return digits(limit=400).load()


def model() -> Model:
    torch.manual_seed(0)
    projector = ProjectorConfig(depth=2, hidden_dim=8, out_dim=4, batch_norm=True, normalize=True)
    return Model(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1), projector, [0.3], [0.4])


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    x, y = blobs()
    ours = fit_logreg(x, y, 4, l2, 500)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(x, y)

    def objective(weights: torch.Tensor) -> float:
        logits = x @ weights[:, :-1].T + weights[:, -1]
        return (F.cross_entropy(logits, y) + l2 / 2 * weights[:, :-1].square().sum()).item()

    reference = torch.from_numpy(np.column_stack([theirs.coef_, theirs.intercept_]))
    assert objective(ours) == pytest.approx(objective(reference), rel=1e-7)
    torch.testing.assert_close(ours[:, :-1], reference[:, :-1], atol=1e-3, rtol=1e-2)
    assert top1(x, y, ours) == pytest.approx(theirs.score(x, y), abs=1 / len(x))
    warm = fit_logreg(x, y, 4, l2, 500, start=fit_logreg(x, y, 4, 1.0, 500))
    assert objective(warm) == pytest.approx(objective(reference), rel=1e-7)


def test_strength_is_chosen_on_validation_and_ties_go_to_the_strongest() -> None:
    x, y = blobs(60, 20)
    x_validation, y_validation = blobs(400, 20)
    grid = [1e-6, 1e-3, 1e-1, 1.0, 10.0]
    chosen, found = choose_l2((x, y), (x_validation, y_validation), 4, grid, 200)
    axes = PrincipalAxes(x)
    scores = {l2: top1(axes(x_validation), y_validation, fit_logreg(axes(x), y, 4, l2, 200)) for l2 in grid}
    assert scores[chosen] >= max(scores.values()) - 0.01
    assert found == pytest.approx(scores[chosen], abs=0.01)
    apart = torch.tensor([[-1.0], [1.0]]).double().repeat(10, 1), torch.tensor([0, 1]).repeat(10)
    assert choose_l2(apart, apart, 2, grid, 50) == (10.0, 1.0)


def test_principal_axes_are_a_rotation_of_standardised_features() -> None:
    x = torch.cat([blobs()[0], torch.full((300, 1), 5.0)], 1)  # the last is constant
    turned = PrincipalAxes(x)(x)
    standard = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-9)
    torch.testing.assert_close(turned @ turned.T, standard @ standard.T, atol=1e-9, rtol=1e-9)
    covariance = turned.T @ turned / len(x)
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [0.2, 0.011, 0.01, 1e-6])
def test_knn_is_the_weighted_vote_at_any_temperature(temperature: float) -> None:
    """Weights exp(cosine / temperature) overflow in float32 below 0.0113 unless they are relative to the largest."""
    x, y = (part.float() if part.is_floating_point() else part for part in blobs(200))
    queries, truth = blobs(80, seed=1)
    found = knn_predict(x, y, queries.float(), 4, k=7, temperature=temperature)
    unit, to_query = F.normalize(x.double(), dim=1), F.normalize(queries, dim=1)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((distances.min(1, keepdims=True) - distances) / temperature)

    reference = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=weights)
    assert found.tolist() == reference.fit(unit.numpy(), y).predict(to_query.numpy()).tolist()
    assert torch.equal(knn_predict(x, y, x, 4, k=1, temperature=temperature), y)
    assert knn_predict(x[:3], y[:3], queries.float(), 4, k=20, temperature=temperature).shape == truth.shape


def test_the_encoder_is_frozen_and_in_eval_mode() -> None:
    net, data = model().train(), splits()
    before = encoder_hash(net.encoder)
    h = extract_features(net, data.test, 64)
    assert torch.equal(h, extract_features(net, data.test, 64))
    torch.testing.assert_close(h, extract_features(net, data.test, 7), atol=1e-5, rtol=1e-5)
    assert net.training
    result = probe_encoder(net, data, CONFIG)
    assert encoder_hash(net.encoder) == before == result.encoder_sha256
    assert set(result.metrics) == {"probe/logreg/top1", "knn/k5/top1"}
    assert result == probe_encoder(net, data, CONFIG)


def test_the_hash_sees_weights_and_buffers() -> None:
    net = model()
    first = encoder_hash(net.encoder)
    net.encoder.layers.norm.running_mean += 1e-3  # type: ignore[operator, union-attr]
    second = encoder_hash(net.encoder)
    next(net.encoder.parameters()).data[0] += 1e-3
    assert len({first, second, encoder_hash(net.encoder)}) == 3


def test_evaluation_that_changes_the_encoder_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    monkeypatch.setattr(net, "eval", net.train)  # batch norm left in training mode
    with pytest.raises(AssertionError, match="changed the encoder"):
        probe_encoder(net, splits(), CONFIG)


def test_pixels_are_a_fair_baseline() -> None:
    result = probe_pixels(splits(), CONFIG)
    assert result.metrics["probe/logreg/top1"] > 0.85
    large = ImageSet(torch.full((2, 3, 96, 96), 51, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert pixels(large).shape == (2, 3 * 32 * 32)
    torch.testing.assert_close(pixels(large), torch.full((2, 3072), 0.2))
    assert pixels(splits().test).shape[1] == 64

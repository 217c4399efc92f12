"""The evaluation of a run: logistic regression and kNN against scikit-learn, what ``evaluate`` returns, and the encoder
that it must not touch. The other protocols are in test_protocols.py.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_files import digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from scclr.config.schema import PretrainConfig, ProbeConfig, ProjectorConfig
from scclr.datasets import ImageSet, Splits
from scclr.encoders.convnet import ConvNet
from scclr.encoders.model import Model
from scclr.evaluate import logreg
from scclr.evaluate.features import encoder_hash, extract_features, extract_layers, pixels
from scclr.evaluate.knn import Knn, knn_predict
from scclr.evaluate.logreg import Fit, LogReg, Objective, accuracy, choose_l2, fit_logreg, predict
from scclr.evaluate.probe import evaluate, knn_accuracy, probe_encoder, probe_pixels
from scclr.evaluate.protocol import Features, Outcome, Protocol
from scclr.run.result import summary

PROTOCOLS: dict[str, Protocol] = {
    "logreg": LogReg(l2=[1e-3, 1e-2], max_iter=50),
    "knn": Knn(k=[5], temperature=[0.1]),
}
CONFIG = ProbeConfig(protocols={"any": {"_target_": "x.X"}}, batch_size=128)


def blobs(n: int = 300, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, n)
    x = draw.normal(size=(classes, dim))[y] + draw.normal(size=(n, dim))
    return torch.from_numpy(x), torch.from_numpy(y)


def standardized(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)


def in_scikit_learn(x: torch.Tensor, y: torch.Tensor, l2: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit(standardized(x), y)


def splits() -> Splits:
    return digits(limit=400).load()


def model() -> Model:
    torch.manual_seed(0)
    projector = ProjectorConfig(depth=2, hidden_dim=8, out_dim=4, batch_norm=True, normalize=True)
    return Model(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1), projector, [0.3], [0.4])


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    x, y = blobs()
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 1.0]) + 3  # features are standardized inside
    theirs = in_scikit_learn(x, y, l2)
    reference = torch.from_numpy(np.column_stack([theirs.coef_, theirs.intercept_]))
    value = F.cross_entropy(standardized(x) @ reference[:, :-1].T + reference[:, -1], y)
    least = (value + l2 / 2 * reference[:, :-1].square().sum()).item()

    objective = Objective.of([(x, y)], l2)
    ours = fit_logreg([(x, y)], 4, l2, 500)
    assert objective(ours.weights)[0].item() == pytest.approx(least, rel=1e-6)
    exact = fit_logreg([(x, y)], 4, l2, 500, tolerance=1e-12)
    on_standardized = exact.weights @ torch.linalg.inv(objective.standard)
    torch.testing.assert_close(on_standardized[:, :-1], reference[:, :-1], atol=1e-5, rtol=1e-5)
    assert accuracy(predict(x, exact.weights), y) == theirs.score(standardized(x), y)
    assert exact.gradient < 1e-5 < fit_logreg([(x, y)], 4, l2, 2).gradient, "what was reached is told"
    warm = fit_logreg([(x, y)], 4, l2, 500, fit_logreg([(x, y)], 4, 1.0, 500).weights)
    assert objective(warm.weights)[0].item() == pytest.approx(least, rel=1e-6)


def test_the_gradient_is_that_of_the_objective() -> None:
    x, y = blobs()
    objective = Objective.of([(x, y)], 0.01)
    weights = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    value = F.cross_entropy(x @ weights[:, :-1].T + weights[:, -1], y)
    value = value + 0.01 / 2 * (weights[:, :-1] * x.std(0, correction=0)).square().sum()
    found, gradient = objective(weights.detach())
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(value, weights)[0])


def test_single_precision_is_near_double_also_far_from_zero() -> None:
    draw = torch.Generator().manual_seed(3)
    y = torch.randint(0, 4, (500,), generator=draw)
    x = torch.randn(4, 12, generator=draw)[y] + torch.randn(500, 12, generator=draw) + 1000 * torch.arange(12.0)
    x[:, 3] = 7.0
    weights = torch.randn(4, 13, generator=draw, dtype=torch.float64) @ Objective.of([(x, y)], 0.01).standard
    double, single = (Objective.of([(x, y)], 0.01, dtype) for dtype in (torch.float64, torch.float32))
    (value, gradient), (near, slope) = double(weights), single(weights)
    assert abs(near / value - 1) < 1e-4
    to_standard = double.standard.T
    torch.testing.assert_close(slope @ to_standard, gradient @ to_standard, rtol=1e-3, atol=1e-3)
    fits = [fit_logreg([(x, y)], 4, 0.01, 200, tolerance=1e-5, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    assert abs(double(fits[1].weights)[0] / double(fits[0].weights)[0] - 1) < 1e-5


def test_parts_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in float32 and in two parts, in blocks of a few rows, against one block of float64."""
    x, y = blobs()
    x = x.float()
    whole = fit_logreg([(x.double(), y)], 4, 1e-3, 100)
    monkeypatch.setitem(logreg.BLOCK, "cpu", 70)
    parts = fit_logreg([(x[:77], y[:77]), (x[77:], y[77:])], 4, 1e-3, 100)
    assert parts.iterations == whole.iterations
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-9, rtol=1e-9)
    assert torch.equal(predict(x, parts.weights), predict(x.double(), whole.weights))


def test_constant_repeated_and_too_many_features_do_no_harm() -> None:
    x, y = blobs(60)
    wide = torch.cat([x, x, torch.full((60, 100), 5.0)], 1)
    fit = fit_logreg([(wide, y)], 4, 1e-9, 200)
    assert fit.weights.isfinite().all()
    assert fit.weights[:, 12:-1].abs().max() == 0
    assert accuracy(predict(wide, fit.weights), y) >= in_scikit_learn(x, y, 1e-3).score(standardized(x), y)


def test_strength_is_chosen_on_validation_and_ties_go_to_the_strongest() -> None:
    x, y = blobs(60, 20)
    validation = blobs(400, 20)
    grid = [1e-6, 1e-3, 1e-1, 1.0, 10.0]
    choice = choose_l2((x, y), validation, 4, grid, 200)
    fits = {l2: fit_logreg([(x, y)], 4, l2, 200) for l2 in grid}
    scores = {l2: accuracy(predict(validation[0], fit.weights), validation[1]) for l2, fit in fits.items()}
    assert scores[choice.l2] >= max(scores.values()) - 0.01
    assert choice.validation == pytest.approx(scores[choice.l2], abs=0.01)
    assert isinstance(choice.fit, Fit)
    apart = torch.tensor([[-1.0], [1.0]]).double().repeat(10, 1), torch.tensor([0, 1]).repeat(10)
    assert choose_l2(apart, apart, 2, grid, 50)[:2] == (10.0, 1.0)


MEMORY = """
import resource, threading, time, torch
from pathlib import Path
from scclr.datasets import ImageSet, Splits
from scclr.evaluate import knn
from scclr.evaluate.logreg import LogReg
from scclr.evaluate.ncc import NearestClassCentre
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features
from scclr.run.machine import keep_freed_memory

def part(n):
    y = torch.arange(n) % 10
    x = torch.randn(n, 512)
    x[torch.arange(n), y] += 1
    return x, y

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def watch():
    while not done.wait(0.001):
        seen.append(resident())

keep_freed_memory()  # as in a run
knn.COSINES = 2**22
protocols = {
    "logreg": LogReg(l2=[1e-3, 1e-2], max_iter=4),
    "knn": knn.Knn(k=[20], temperature=[0.1]),
    "ncc": NearestClassCentre(),
}
train, validation, test = part(80_000), part(8_000), part(8_000)
sets = [ImageSet(torch.empty(len(y), 1, 1, 1, dtype=torch.uint8), y) for _, y in (train, validation, test)]
splits = Splits(sets[0], *sets, tuple("0123456789"), (0.5,), (0.5,))
small = [(x[:1000], y[:1000]) for x, y in (train, validation, test)]
probe(Features(*small, splits), protocols)
seen, done = [resident()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
probe(Features(train, validation, test, splits), protocols)
done.set()
watcher.join()
print((max(seen) - seen[0]) / (96_000 * 512 * 4))
"""


@pytest.mark.slow
def test_the_probe_copies_no_features() -> None:
    """What it adds to 200 MB of features is a part of them."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < 0.5, done.stdout


@pytest.mark.parametrize("temperature", [0.2, 0.011, 0.01, 1e-6])
def test_knn_is_the_weighted_vote_at_any_temperature(temperature: float) -> None:
    """Weights exp(cosine / temperature) overflow in float32 below 0.0113 unless they are relative to the largest."""
    x, y = (part.float() if part.is_floating_point() else part for part in blobs(200))
    queries, truth = blobs(80, seed=1)
    found = knn_predict([(x, y)], queries.float(), 4, k=7, temperature=temperature)
    unit, to_query = F.normalize(x.double(), dim=1), F.normalize(queries, dim=1)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((distances.min(1, keepdims=True) - distances) / temperature)

    reference = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=weights)
    assert found.tolist() == reference.fit(unit.numpy(), y).predict(to_query.numpy()).tolist()
    assert torch.equal(knn_predict([(x, y)], x, 4, k=1, temperature=temperature), y)
    parts = [(x[:3], y[:3]), (x[3:150], y[3:150]), (x[150:], y[150:])]
    assert torch.equal(knn_predict(parts, queries.float(), 4, k=7, temperature=temperature), found)
    assert knn_predict([(x[:3], y[:3])], queries.float(), 4, k=20, temperature=temperature).shape == truth.shape


def test_the_encoder_is_frozen_and_in_eval_mode() -> None:
    net, data = model().train(), splits()
    before = encoder_hash(net.encoder)
    h = extract_features(net, data.test, 64)
    assert torch.equal(h, extract_features(net, data.test, 64))
    torch.testing.assert_close(h, extract_features(net, data.test, 7), atol=1e-5, rtol=1e-5)
    assert net.training
    found = evaluate(net, model(), data, PROTOCOLS, CONFIG, 0)
    assert encoder_hash(net.encoder) == before == found["encoder_sha256"]
    again = probe_encoder(net, data, PROTOCOLS, CONFIG, 0)
    assert again.keys() == {"logreg-v1", "knn-v1"}
    for name, outcome in again.items():
        assert {f"{name}/{metric}": x for metric, x in outcome.metrics.items()}.items() <= found["metrics"].items()


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
        evaluate(net, model(), splits(), PROTOCOLS, CONFIG, 0)


def test_pixels_are_a_fair_baseline() -> None:
    assert probe_pixels(splits(), PROTOCOLS, CONFIG, 0)["logreg-v1"].metrics["top1"] > 0.85
    large = ImageSet(torch.full((2, 3, 96, 96), 51, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert pixels(large).shape == (2, 3 * 32 * 32)
    torch.testing.assert_close(pixels(large), torch.full((2, 3072), 0.2))
    assert pixels(splits().test).shape[1] == 64


class Counted(Protocol):
    """What it was given, as numbers."""

    version = 3

    def __init__(self, *, baselines: bool = True) -> None:
        self.baselines = baselines  # type: ignore[misc]

    def __call__(self, features: Features) -> Outcome:
        widths = {"width": features.train[0].shape[1], "seed": features.seed, "pixels": features.model is None}
        return Outcome(widths, 0.5, {"layer": features.layer}, torch.eye(10, dtype=torch.int64))


def test_layers_baselines_and_versions_are_in_the_names() -> None:
    config = ProbeConfig(protocols=CONFIG.protocols, batch_size=128, layers=["h", "z"])
    protocols: dict[str, Protocol] = {"a": Counted(), "b": Counted(baselines=False)}
    found = evaluate(model(), model(), splits(), protocols, config, 7)
    untrained, pixel = "baseline/untrained/", "baseline/pixels/"
    names = ["a-v3", "b-v3", "z/a-v3", "z/b-v3", f"{untrained}a-v3", f"{untrained}z/a-v3", f"{pixel}a-v3"]
    assert list(found["validation"]) == list(found["chosen"]) == list(found["confusion"]) == names
    metrics = found["metrics"]
    assert [metrics[f"{name}/width"] for name in names] == [16, 16, 4, 4, 16, 4, 64]
    assert [metrics[f"{name}/pixels"] for name in names] == [0] * 6 + [1]
    assert {metrics[f"{name}/seed"] for name in names} == {7}
    assert [found["chosen"][name]["layer"] for name in names] == ["h", "h", "z", "z", "h", "z", "h"]
    assert found["left_out"] == {}


def test_both_layers_come_from_one_pass() -> None:
    net, data = model(), splits().test
    both = extract_layers(net, data, 64, ["h", "z"])
    h, z = net.eval()(data.images.float() / 255)  # type: ignore[union-attr]
    torch.testing.assert_close(both["h"], h.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both["z"], z.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(extract_layers(net, data, 64, ["z"])["z"], both["z"])
    assert torch.equal(extract_features(net, data, 64), both["h"])
    net.projector = torch.nn.Sequential()
    assert extract_layers(net, data, 64, ["z"])["z"].shape == both["h"].shape


def test_pixels_of_very_many_images_are_left_out_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.evaluate.probe.MOST_PIXELS", 100)
    found = evaluate(model(), model(), splits(), PROTOCOLS, CONFIG, 0)
    assert found["left_out"] == {"baseline/pixels/": "over 100 images"}
    assert set(found["validation"]) == {"logreg-v1", "baseline/untrained/logreg-v1"}
    assert set(found["chosen"]["logreg-v1"]) == {"l2", "gradient"}
    shown = summary({**found, "seconds": {"total": 1.0}}, Path("run"), "")
    assert "untrained encoder" in shown
    assert "raw pixels" not in shown


def test_knn_during_pretraining_votes_with_the_first_images() -> None:
    net, data = model(), splits()
    options = {"knn_images": 90, "knn_k": 7, "knn_temperature": 0.3}
    plain = dict.fromkeys(("epochs", "log_every", "knn_every"), 1) | {"batch_size": 2, "warmup": 0.1}
    words = {"precision": "auto", "compile": "auto", "channels_last": True}
    found = knn_accuracy(net, data, PretrainConfig(**plain, **words, **options), 64)  # type: ignore[arg-type]
    bank, queries = (extract_features(net, part, 64) for part in (data.train[slice(0, 90)], data.validation))
    predicted = knn_predict([(bank, data.train.labels[:90])], queries, 10, k=7, temperature=0.3)
    assert found == (predicted == data.validation.labels).double().mean()


def test_the_table_shows_a_column_for_each_protocol_and_older_results() -> None:
    metrics = {
        "quality/h/rankme": 7.0, "logreg-v1/ece": 0.1, "logreg-v1/top1": 0.5, "logreg-v1/top1/many": 0.9,
        "clusters-v1/ari": 0.3, "clusters-v1/nmi": 0.25, "lowshot-v1/shots1/top1": 0.2, "lowshot-v1/shots5/top1": 0.3,
        "z/logreg-v1/top1": 0.4, "baseline/untrained/logreg-v1/top1": 0.1, "mnist/logreg-v1/top1": 0.6,
        "mnist/baseline/pixels/logreg-v1/top1": 0.7,
    }  # fmt: skip
    lines = summary({"metrics": metrics, "seconds": {"total": 1.0}}, Path("run"), "").splitlines()
    assert [line.split() for line in lines[1:9]] == [
        ["test", "split,", "%", "logreg-v1/top1", "clusters-v1/nmi", "lowshot-v1/shots1/top1"],
        ["pretrained", "50.00", "25.00", "20.00"],
        ["pretrained,", "many", "images", "90.00"],
        ["pretrained,", "z", "40.00"],
        ["untrained", "encoder", "10.00"],
        ["mnist/pretrained", "60.00"],
        ["mnist/raw", "pixels", "70.00"],
        [],
    ]
    assert "quality" not in "".join(lines)
    older = {"probe/logreg/top1": 0.5, "knn/k20/top1": 0.25, "baseline/pixels/probe/logreg/top1": 0.125}
    lines = summary({"metrics": older, "seconds": {"total": 1.0}}, Path("run"), "").splitlines()
    assert lines[2].split() == ["pretrained", "50.00", "25.00"]
    assert lines[3].split() == ["raw", "pixels", "12.50"]

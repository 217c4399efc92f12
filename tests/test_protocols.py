"""Every protocol of the evaluation against scikit-learn or brute force, and the numbers of their versions."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import TINY, compose, result_of, run_folders
from protocol_helpers import clusters, features_of, three_parts
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    balanced_accuracy_score,
    confusion_matrix,
    normalized_mutual_info_score,
    top_k_accuracy_score,
)
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import scclr as package
from scclr.components import make_protocols
from scclr.config.build import build
from scclr.config.compose import conf_dir
from scclr.config.errors import UserError
from scclr.evaluate import knn
from scclr.evaluate.clusters import Clusters
from scclr.evaluate.features import own_share
from scclr.evaluate.knn import Knn
from scclr.evaluate.logreg import LogReg, fit_logreg
from scclr.evaluate.lowshot import LowShot, first_of_each
from scclr.evaluate.ncc import NearestClassCentre
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features, Protocol
from scclr.evaluate.scores import Tally

GRID = [1e-3, 1e-1]
FREE = ("logreg", "knn", "knn200", "ncc", "lowshot", "clusters")  # the others have test_trained_protocols.py


def lowshot(**changes: object) -> LowShot:
    sizes = {"shots": [1, 5], "shares": [0.1], "draws": 4, "l2": GRID, "max_iter": 100}
    return LowShot(**{**sizes, **changes})  # type: ignore[arg-type]


def unit(x: Tensor) -> np.ndarray:
    return F.normalize(x.double(), dim=1).numpy()


# What all classifiers share -------------------------------------------------------------------------------------------


def guo(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error as Guo et al. 2017 compute it, bin by bin."""
    edges = np.linspace(0, 1, 16)
    found = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            found += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return found


@pytest.mark.parametrize("classes", [3, 8])
def test_scores_are_scikit_learns(classes: int) -> None:
    scores = 2 * torch.randn(500, classes, generator=torch.Generator().manual_seed(0)).double()
    y = torch.randint(0, classes - 1, (500,), generator=torch.Generator().manual_seed(1))  # the last class is absent
    tally = Tally(classes, y.device)
    for part in (slice(0, 7), slice(7, 7), slice(7, 500)):
        tally.add(scores[part], y[part])
    found = tally.metrics(three_parts().splits)
    p = scores.softmax(1).numpy()
    predicted = p.argmax(1)
    assert found["top1"] == (predicted == y.numpy()).mean()
    assert found["balanced"] == pytest.approx(np.mean([(predicted == c)[y == c].mean() for c in range(classes - 1)]))
    assert found["ece"] == pytest.approx(guo(p.max(1), predicted == y.numpy()))
    assert np.array_equal(tally.confusion, confusion_matrix(y, predicted, labels=range(classes)))
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        assert found["top5"] == top_k_accuracy_score(y, p, k=5, labels=range(classes))
    present = torch.isin(torch.from_numpy(predicted), y)
    tally = Tally(classes, y.device)
    tally.add(scores[present], y[present])
    reference = balanced_accuracy_score(y[present], predicted[present])
    assert tally.metrics(three_parts().splits)["balanced"] == pytest.approx(reference)


def test_a_class_without_a_vote_is_not_among_the_best_five() -> None:
    scores, y = torch.full((1, 9), -math.inf), torch.tensor([5])
    scores[0, 8] = 0.0
    for others, expected in (([], 0.0), ([5], 1.0), ([0, 1, 2, 3, 5], 0.0), ([0, 1, 2, 5, 6, 7], 1.0)):
        tally = Tally(9, y.device)
        tally.add(scores.index_fill(1, torch.tensor(others, dtype=torch.int64), -1.0), y)
        assert tally.metrics(three_parts().splits)["top5"] == expected, others


def test_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_one() -> None:
    tally, y = Tally(2, torch.device("cpu")), torch.tensor([0, 1, 0])
    tally.add(torch.tensor([[0.6, 0.4], [0.6, 0.4], [1.0, 0.0]]).log(), y)
    assert tally.bins[:, 0].nonzero().flatten().tolist() == [8, 14]
    assert tally.metrics(three_parts().splits)["ece"] == pytest.approx((abs(1.2 - 1) + 0) / 3)


# kNN ------------------------------------------------------------------------------------------------------------------


def lightly(feature: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, t: float) -> Tensor:
    """lightly's ``knn_predict``, transcribed: the classes of each query, the best first."""
    similarity = torch.mm(feature, bank.T)
    weight, indices = similarity.topk(k=k, dim=-1)
    neighbours = torch.gather(labels.expand(feature.size(0), -1), dim=-1, index=indices)
    weight = (weight / t).exp()
    one_hot = torch.zeros(feature.size(0) * k, classes, dtype=weight.dtype)
    one_hot = one_hot.scatter(dim=-1, index=neighbours.view(-1, 1), value=1.0)
    scores = torch.sum(one_hot.view(feature.size(0), -1, classes) * weight.unsqueeze(-1), dim=1)
    return scores.argsort(dim=-1, descending=True)


def test_knn200_is_lightlys() -> None:
    """Training images only are neighbours there, so nothing is fitted on validation."""
    parts = [clusters(n, classes=7, width=8, apart=0.5, seed=n) for n in (400, 50, 150)]
    features = features_of(*parts, classes=7, refit=False)
    ((name, protocol),) = make_protocols(compose("probe.protocols=[knn200]")).items()
    outcome = protocol(features)
    (x, y), (queries, truth) = features.train, features.test
    best = lightly(torch.from_numpy(unit(queries)), torch.from_numpy(unit(x)), y, 7, 200, 0.1)
    assert name == "knn200"
    assert outcome.metrics["top1"] == (best[:, 0] == truth).double().mean()
    assert outcome.metrics["top5"] == (best[:, :5] == truth.unsqueeze(1)).any(1).double().mean()
    assert np.array_equal(outcome.confusion, confusion_matrix(truth, best[:, 0]))  # type: ignore[arg-type]
    assert (outcome.validation, outcome.chosen) == (None, {"k": 200, "temperature": 0.1})


def test_a_grid_is_chosen_on_validation_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    features = three_parts()
    passes = []
    plain = knn.neighbours
    monkeypatch.setattr(knn, "neighbours", lambda *given: passes.append(given[2]) or plain(*given))
    outcome = Knn(k=[1, 40, 5, 10**6], temperature=[0.05, 1.0])(features)
    assert passes == [300, outcome.chosen["k"]]
    found = {}
    for k in (1, 40, 5, 10**6):
        for temperature in (0.05, 1.0):
            predicted = knn.knn_predict(
                [features.train], features.validation[0], 7, k=min(k, 300), temperature=temperature
            )
            found[k, temperature] = (predicted == features.validation[1]).double().mean().item()
    best = max(found, key=lambda rule: found[rule])
    assert len(set(found.values())) > 4
    assert outcome.validation == found[best]
    assert (outcome.chosen["k"], outcome.chosen["temperature"]) == best
    predicted = knn.knn_predict(features.known, features.test[0], 7, k=best[0], temperature=best[1])
    assert outcome.metrics["top1"] == (predicted == features.test[1]).double().mean()


def test_more_neighbours_than_images_are_cut_and_this_is_said() -> None:
    features = three_parts()
    outcome = Knn(k=[10**6], temperature=[0.1])(features)
    assert outcome.chosen["k"] == 390
    assert outcome.metrics == Knn(k=[390], temperature=[0.1])(features).metrics


# The nearest class centre ---------------------------------------------------------------------------------------------


def test_the_nearest_class_centre_is_scikit_learns() -> None:
    features = three_parts()
    x, y = (torch.cat(parts) for parts in zip(features.train, features.validation, strict=True))
    predicted = NearestCentroid().fit(unit(x), y).predict(unit(features.test[0]))
    outcome = NearestClassCentre()(features)
    assert 0.3 < outcome.metrics["top1"] == (predicted == features.test[1].numpy()).mean()
    assert np.array_equal(outcome.confusion, confusion_matrix(features.test[1], predicted))  # type: ignore[arg-type]
    assert "ece" not in outcome.metrics
    assert (outcome.validation, outcome.chosen) == (None, {})


def test_a_class_without_images_has_no_centre() -> None:
    features = three_parts()
    other = Features(features.train, features.validation, features.test, features_of(
        features.train, features.validation, features.test, classes=9).splits)  # fmt: skip
    found, before = NearestClassCentre()(other), NearestClassCentre()(features)
    assert found.metrics["top1"] == before.metrics["top1"]
    assert found.confusion is not None
    assert found.confusion[:, 7:].sum() == 0


# Few labels -----------------------------------------------------------------------------------------------------------


def test_draws_are_nested_and_take_from_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 9 + [2] * 3)
    order = torch.from_numpy(np.random.default_rng(0).permutation(52))
    rows = {size: first_of_each(labels, order, size) for size in (1, 3, 0.01, 0.1, 0.5, 0.999)}
    taken = {size: torch.bincount(labels[found], minlength=3).tolist() for size, found in rows.items()}
    assert taken == {1: [1] * 3, 3: [3] * 3, 0.01: [1] * 3, 0.1: [4, 1, 1], 0.5: [20, 4, 2], 0.999: [40, 9, 3]}
    for found in rows.values():
        assert found.tolist() == sorted(set(found.tolist()))
    assert set(rows[0.1].tolist()) <= set(rows[0.5].tolist())
    for c in range(3):
        of_class = [row for row in order.tolist() if labels[row] == c]
        assert set(of_class[:3]) == {row for row in rows[3].tolist() if labels[row] == c}


def test_low_shot_is_scikit_learns_on_the_same_draws() -> None:
    features = three_parts()
    outcome = lowshot(shots=[5], shares=[], l2=[1e-2], max_iter=1000)(features)
    (x, y), (queries, truth) = features.train, features.test
    accuracies = []
    for draw in range(4):
        order = np.random.default_rng([features.seed, draw]).permutation(len(y))
        rows = [row for c in range(7) for row in [row for row in order if y[row] == c][:5]]
        scaler = StandardScaler().fit(x[rows].double())
        model = LogisticRegression(C=1 / (1e-2 * len(rows)), tol=1e-10, max_iter=5000)
        model.fit(scaler.transform(x[rows].double()), y[rows])
        accuracies.append(model.score(scaler.transform(queries.double()), truth))
    low, high = stats.t.interval(0.95, 3, np.mean(accuracies), stats.sem(accuracies))
    found = {name.removeprefix("shots5/"): value for name, value in outcome.metrics.items()}
    assert found["top1"] == pytest.approx(np.mean(accuracies))
    assert found["top1_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (found["top1_low"], found["top1_high"]) == pytest.approx((low, high))
    assert low < found["top1"] < high


def test_low_shot_chooses_for_each_draw_and_names_its_sizes() -> None:
    outcome = lowshot()(three_parts())
    assert next(iter(outcome.metrics)) == "shots1/top1", "the headline"
    names = {name.split("/")[0] for name in outcome.metrics}
    assert names == {"shots1", "shots5", "share0.1"} == set(outcome.chosen["l2"])
    assert all(len(found) == 4 and set(found) <= set(GRID) for found in outcome.chosen["l2"].values())
    assert outcome.metrics["shots1/top1"] < outcome.metrics["shots5/top1"]
    single = lowshot(draws=1)(three_parts()).metrics
    assert {name.split("/")[1] for name in single} == {"top1", "top5", "balanced", "ece"}
    assert outcome.metrics != lowshot()(features_with_seed(1)).metrics


def features_with_seed(seed: int) -> Features:
    plain = three_parts()
    return Features(plain.train, plain.validation, plain.test, plain.splits, seed=seed)


def test_all_images_in_one_draw_are_the_logistic_regression_of_the_training_images() -> None:
    plain = three_parts()
    features = features_of(plain.train, plain.validation, plain.test, classes=7, refit=False)
    whole = LogReg(l2=GRID, max_iter=100)(features)
    drawn = lowshot(shots=[], shares=[1.0], draws=1)(features)
    assert drawn.metrics["share1/top1"] == whole.metrics["top1"]
    assert drawn.metrics["share1/ece"] == pytest.approx(whole.metrics["ece"], abs=1e-4)
    assert drawn.validation == whole.validation


def test_more_shots_than_images_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^shots=\[43\]: class 'class 6' has 42 training images; give at most that many"
    ):
        lowshot(shots=[43]).check(three_parts().splits)
    lowshot(shots=[42]).check(three_parts().splits)


# Clusters -------------------------------------------------------------------------------------------------------------


def test_clusters_are_scikit_learns_and_read_no_labels() -> None:
    features = three_parts((600, 90, 300))
    outcome = Clusters(n_init=3, images=10**6)(features)
    x = np.concatenate([unit(part[0]) for part in features.known])
    fits = [KMeans(7, n_init=3, random_state=seed).fit(x) for seed in range(5)]
    best = min(fits, key=lambda fit: fit.inertia_)
    found, truth = best.predict(unit(features.test[0])), features.test[1].numpy()
    assert outcome.metrics["nmi"] == pytest.approx(normalized_mutual_info_score(truth, found), abs=0.05)
    assert outcome.metrics["ari"] == pytest.approx(adjusted_rand_score(truth, found), abs=0.05)
    renamed = [(part, torch.zeros_like(y)) for part, y in (features.train, features.validation)]
    blind = Features(*renamed, features.test, features.splits)  # type: ignore[arg-type]
    assert Clusters(n_init=3, images=10**6)(blind).metrics == outcome.metrics
    apart = [clusters(n, classes=7, width=8, apart=30.0, seed=n) for n in (200, 50, 90)]
    exact = Clusters(n_init=10, images=10**6)(features_of(*apart, classes=7)).metrics
    assert exact == {"nmi": pytest.approx(1.0), "ari": pytest.approx(1.0)}


def test_a_collapsed_encoder_has_no_clusters() -> None:
    parts = [(torch.ones(n, 3), torch.arange(n) % 4) for n in (80, 20, 40)]
    assert Clusters(n_init=2, images=50)(features_of(*parts, classes=4)).metrics == {"nmi": 0.0, "ari": 0.0}


# All of them ----------------------------------------------------------------------------------------------------------


def small(name: str) -> Protocol:
    """A protocol with the options of its YAML, but for what takes time."""
    words = {"lowshot": ["probe.protocols.lowshot.draws=2"]}.get(name, [])
    return make_protocols(compose(f"probe.protocols=[{name}]", *words))[name]


# If one of these changes, so must the version of the protocol: runs of both versions lie beside each other.
GOLDEN: dict[str, dict[str, float]] = {
    "logreg": {"top1": 0.7167, "top5": 0.9833, "balanced": 0.7152, "ece": 0.3139},
    "knn": {"top1": 0.6667, "top5": 0.9833, "balanced": 0.6648, "ece": 0.1069},
    "knn200": {"top1": 0.7083, "top5": 1.0, "balanced": 0.7068, "ece": 0.187},
    "ncc": {"top1": 0.725, "top5": 1.0, "balanced": 0.7236},
    "lowshot": {
        "shots1/top1": 0.4125, "shots1/top1_std": 0.0059, "shots1/top1_low": 0.3596, "shots1/top1_high": 0.4654,
        "shots5/top1": 0.5917, "shots10/top1": 0.675, "share0.01/top1": 0.4125, "share0.1/top1": 0.6083,
    },
    "clusters": {"nmi": 0.4955, "ari": 0.391},
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_the_numbers_of_a_version_do_not_change(name: str) -> None:
    protocol = small(name)
    found = protocol(three_parts()).metrics
    assert (protocol.version, {metric: found[metric] for metric in GOLDEN[name]}) == (
        1,
        pytest.approx(GOLDEN[name], abs=2e-4),
    )


def test_every_protocol_has_a_golden_number() -> None:
    trained = {"sgd", "finetune", "finetune1", "finetune10"}  # in test_trained_protocols.py
    assert {path.stem for path in (conf_dir() / "protocol").glob("*.yaml")} == {*GOLDEN, *trained}


def own(features: Features) -> Features:
    """The share of this process."""
    parts = []
    for (x, _), data in zip(
        (features.train, features.validation, features.test),
        (features.splits.train, features.splits.validation, features.splits.test),
        strict=True,
    ):
        rows = own_share(type(data)(torch.arange(len(data)).view(-1, 1, 1, 1).byte(), torch.arange(len(data)))).labels
        parts.append((x[rows], data.labels[rows]))
    return Features(*parts, features.splits)  # type: ignore[arg-type]


def evaluate_shares(rank: int, size: int, folder: str) -> None:
    """One process of ``test_processes_that_hold_shares_are_one``: what it finds is in ``<rank>.pt``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    knn.QUERIES = 32
    features = own(three_parts((301, 90, 121)))
    outcomes = probe(features, {name: small(name) for name in FREE}).items()
    found = {name: (dict(one.metrics), one.validation, one.confusion) for name, one in outcomes}
    torch.save((found, fit_logreg(features.known, 7, 1e-3, 100)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_that_hold_shares_are_one(tmp_path: Path) -> None:
    """The shares are 151 and 150 images, fewer than the 200 that vote in knn200."""
    mp.spawn(evaluate_shares, (2, str(tmp_path)), nprocs=2)
    features = three_parts((301, 90, 121))
    here, fit = probe(features, {name: small(name) for name in FREE}), fit_logreg(features.known, 7, 1e-3, 100)
    for rank in range(2):
        there, (weights, gradient, _) = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(weights, fit.weights, atol=1e-9, rtol=1e-9)
        assert gradient == pytest.approx(fit.gradient, rel=1e-6)
        for name, outcome in here.items():
            metrics, validation, confusion = there[name]
            assert metrics == pytest.approx(dict(outcome.metrics), abs=1e-4), name  # fits leave 1e-7 of their objective
            assert validation == pytest.approx(outcome.validation), name
            assert (confusion is None) == (outcome.confusion is None)
            assert confusion is None or torch.equal(confusion, outcome.confusion), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("knn", {"k": []}, r"k=\[\]: give one or more different numbers, from 1 to"),
        ("knn", {"k": [1, 1]}, r"k=\[1, 1\]: give one or more different"),
        ("knn", {"temperature": [math.nan]}, r"temperature=\[nan\]: give"),
        ("logreg", {"l2": [0.0]}, r"l2=\[0.0\]: give"),
        ("logreg", {"max_iter": 0}, "max_iter=0: give a number from 1 to"),
        ("lowshot", {"shots": [], "shares": []}, r"shots=\[\]: give"),
        ("lowshot", {"shares": [1.5]}, r"shares=\[1.5\]: give one or more different numbers, from 1e-06 to 1"),
        ("lowshot", {"draws": 0}, "draws=0"),
        ("clusters", {"images": 1}, "images=1"),
        ("clusters", {"n_init": 0}, "n_init=0"),
        ("ncc", {"k": 1}, "NearestClassCentre takes no arguments"),
    ],
)
def test_options_out_of_range_are_refused_when_built(name: str, options: dict, message: str) -> None:
    node = compose(f"probe.protocols=[{name}]").probe.protocols[name]
    with pytest.raises(UserError, match=rf"^probe\.protocols\.{name}[:.].*{message}"):
        build(f"probe.protocols.{name}", {**node, **options})


def test_a_probe_of_all_protocols_and_both_layers_is_recorded(scclr: Callable[..., int], folder: Path) -> None:
    words = ["probe.layers=[h,z]", f"probe.protocols=[{','.join(FREE)}]", "probe.protocols.lowshot.draws=2"]
    assert (
        scclr("train", *TINY, *words, "probe.protocols.lowshot.shots=[1,2]", "probe.protocols.clusters.n_init=1") == 0
    )
    (run,) = run_folders(folder)
    result = result_of(run)
    with np.load(run / "confusion.npz") as confusion:
        for name, matrix in confusion.items():
            assert matrix.dtype == np.int64
            assert matrix.trace() / matrix.sum() == result["metrics"][f"{name}/top1"]
        rows = ("", "z/", "baseline/untrained/", "baseline/untrained/z/", "baseline/pixels/")
        assert set(confusion) == {f"{row}{name}-v1" for row in rows for name in ("logreg", "knn", "knn200", "ncc")}
    assert result["chosen"]["knn200-v1"]["k"] == 200
    assert set(result["validation"]) == {f"{row}{name}-v1" for row in rows for name in ("logreg", "lowshot")}
    for line in (["probe.protocols=[logreg,knn]"], ["probe.protocols=[knn,logreg]"]):
        assert scclr("train", *TINY, *line) == 0
    assert len(run_folders(folder)) == 2, "the order of protocols makes no other run"


OWN = '''
from scclr.evaluate.protocol import Outcome, Protocol

class Majority(Protocol):
    """The share of the largest class."""
    version = 2
    def __init__(self, *, digits: int = 3) -> None:
        self.digits = digits
    def __call__(self, features):
        y = features.test[1]
        return Outcome({"share": round(y.bincount().max().item() / len(y), self.digits)})
'''


def test_a_protocol_of_the_users_own(
    scclr: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_conf" / "protocol").mkdir(parents=True)
    (folder / "mine.py").write_text(OWN)
    text = "# @package probe.protocols.mine\n_target_: mine.Majority\ndigits: 2\n"
    (folder / "my_conf" / "protocol" / "mine.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    assert (
        scclr("train", *TINY[:-2], "--config-dir", "my_conf", "probe.protocols=[knn,mine]", "stages=[pretrain,probe]")
        == 0
    )
    (run,) = run_folders(folder)
    assert result_of(run)["metrics"]["mine-v2/share"] == pytest.approx(0.1, abs=0.02)
    assert "mine-v2/share" in capsys.readouterr().out
    assert result_of(run)["sources"]["protocol_mine"]["file"] == "source_protocol_mine.py"
    assert (run / "source_protocol_mine.py").read_text() == OWN
    with pytest.raises(UserError, match=r"its probe.protocols.mine is mine.Majority.*type trust=\[mine\]"):
        package.load(run)
    assert package.load(run, trust=["mine"]).metrics["mine-v2/share"] == pytest.approx(0.1, abs=0.02)
    (folder / "my_conf" / "protocol" / "mine.yaml").write_text(text.replace("mine.Majority", "collections.OrderedDict"))
    assert scclr("train", *TINY[:-2], "--config-dir", "my_conf", "probe.protocols=[mine]") == 1
    assert "probe.protocols.mine" in capsys.readouterr().err.splitlines()[-1]

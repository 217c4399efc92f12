"""Quality without labels, against the authors' code or their equations, and in whole runs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compose, noise, result_of, rows_of, run_folders, training
from image_files import all_images, write_photographs
from torch import Tensor

from scclr.datasets import ImageSet
from scclr.evaluate import quality
from scclr.evaluate.features import FRESH
from scclr.evaluate.quality import ViewScatter, alpha_req, lidar, measure_quality, rankme, spectra
from scclr.losses.balanced import BalancedLoss
from scclr.losses.decoupled import DecoupledLoss
from scclr.pretrain.state import Watch

Run = Callable[..., int]
NAMES = {f"quality/{layer}/{name}" for layer in "hz" for name in ("rankme", "lidar")}  # 16 numbers are no power law


def features(n: int, width: int, decay: float, seed: int = 0) -> Tensor:
    """Rows that are not centred, whose variances fall as a power law with some noise."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, width + 1).double() ** (-decay / 2) * (0.5 + torch.rand(width, generator=draw))
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=draw)).Q
    return (torch.randn(n, width, dtype=torch.float64, generator=draw) * scales + 0.3) @ basis


def authors_rankme(z: np.ndarray) -> float:
    """Garrido et al. 2023, eq. 1 and 2."""
    sigma = np.linalg.svd(z, compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def authors_alpha(x: np.ndarray) -> float:
    """``get_alpha`` of reptrix, the package of the authors of alpha-ReQ, with its default range."""
    eigen = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    eigen = eigen / eigen.sum()
    trange = np.arange(10, min(100, len(eigen)))
    y = np.log(np.abs(eigen))[trange][:, np.newaxis]
    trange = trange + 1
    x = np.concatenate((-np.log(trange)[:, np.newaxis], np.ones((trange.size, 1))), axis=1)
    w = 1.0 / trange.astype(np.float32)[:, np.newaxis]
    return float(np.linalg.solve(x.T @ (x * w), (w * x).T @ y).flatten()[0])


def authors_lidar(x: np.ndarray) -> float:
    """The equations of Thilak et al. 2024, image by image, from views [n, q, D]."""
    n, q, width = x.shape
    mu_x = x.mean(1)
    mu = mu_x.mean(0)
    between, within = np.zeros((width, width)), 1e-4 * np.eye(width)
    for i in range(n):
        between += np.outer(mu_x[i] - mu, mu_x[i] - mu) / n
        for view in x[i]:
            within += np.outer(view - mu_x[i], view - mu_x[i]) / (n * q)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    found = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = found / np.abs(found).sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(("n", "width", "decay"), [(600, 128, 1.0), (600, 64, 2.0), (40, 128, 1.0), (9000, 30, 0.5)])
def test_rankme_and_alpha_req_are_the_authors(n: int, width: int, decay: float) -> None:
    x = features(n, width, decay)
    singular, variances = spectra(x)
    assert len(singular) == min(n, width)
    torch.testing.assert_close(singular, torch.linalg.svdvals(x), rtol=1e-8, atol=1e-10)
    assert rankme(singular).item() == pytest.approx(authors_rankme(x.numpy()), rel=1e-6)
    if n > width:
        assert alpha_req(variances).item() == pytest.approx(authors_alpha(x.numpy()), rel=1e-6)


def test_alpha_req_is_the_exponent_of_a_power_law_and_needs_enough_of_it() -> None:
    exact = torch.arange(1, 257).double() ** -1.37
    assert alpha_req(exact).item() == pytest.approx(1.37, rel=1e-9)
    noisy = torch.cat([exact[:10] * 9, exact[10:100], exact[100:] / 9])
    assert alpha_req(noisy).item() == pytest.approx(1.37, rel=1e-9), "the first ten and what is beyond 100 do not count"
    assert alpha_req(exact[:20]).item() == pytest.approx(1.37, rel=1e-9)
    assert math.isnan(alpha_req(exact[:19]).item())
    assert math.isnan(alpha_req(torch.where(exact > exact[19], exact, 0)).item())


@pytest.mark.parametrize(("n", "q", "width"), [(60, 5, 12), (8, 10, 20)])
def test_lidar_is_the_papers(n: int, q: int, width: int) -> None:
    images, views = features(n, width, 1.0), features(n * q, width, 0.5, seed=1).unflatten(0, (n, q))
    x = images.unsqueeze(1) + 0.3 * views
    sums = ViewScatter(width, torch.device("cpu"))
    for part in x.split(7):
        sums.add(part)
    between, within = sums.covariances()
    assert lidar(between, within).item() == pytest.approx(authors_lidar(x.numpy()), rel=1e-6)


def test_what_is_measured_are_the_training_images_and_fresh_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it again by hand. Labels, the mode of the model and random states play no part."""
    monkeypatch.setattr(quality, "CLASSES", 30)
    monkeypatch.setattr(quality, "AT_ONCE", 8)
    monkeypatch.setattr(quality, "VIEWS", 3)
    state, augment = training(compose(*TINY, "encoder.widths=[8,24]"))
    data = noise(40)
    before, random = state.model.training, torch.get_rng_state()
    found = measure_quality(state.model, data, augment, 16, seed=0)
    assert state.model.training == before
    assert torch.equal(random, torch.get_rng_state())
    others = measure_quality(state.model, ImageSet(data.images, torch.full((40,), -1)), augment, 16, seed=0)
    assert others == found

    model = state.model.eval()
    order = torch.randperm(40, generator=_generator(0))
    chosen = data[order].images
    with torch.no_grad():
        clean = dict(zip("hz", model(chosen.float() / 255), strict=True))  # type: ignore[union-attr]
        parts: dict[str, list[Tensor]] = {"h": [], "z": []}
        for number, part in enumerate(chosen[:30].split(8)):  # type: ignore[union-attr]
            steps = [model(augment(part, seed=0, step=FRESH + 2 * number + i)) for i in (0, 1)]
            for layer, rows in zip("hz", zip(*steps, strict=True), strict=True):
                four = torch.cat(list(rows)).unflatten(0, (4, len(part)))
                parts[layer].append(four[:3].transpose(0, 1))
    assert found.metrics.keys() == NAMES | {"quality/h/alpha_req"}
    for layer in "hz":
        x = clean[layer].double().numpy()
        views = torch.cat(parts[layer]).double().numpy()
        assert found.metrics[f"quality/{layer}/rankme"] == pytest.approx(authors_rankme(x), rel=1e-5)
        assert found.metrics[f"quality/{layer}/lidar"] == pytest.approx(authors_lidar(views), rel=1e-4)
        sigma = np.linalg.svd(x, compute_uv=False)
        assert found.spectrum[layer] == pytest.approx((sigma / sigma.sum()).tolist(), abs=1e-6)
    assert found.metrics["quality/h/alpha_req"] == pytest.approx(authors_alpha(clean["h"].double().numpy()), rel=1e-3)


def _generator(seed: int) -> torch.Generator:
    from scclr.augment import SAMPLE_STREAM, generator

    return generator(seed, 0, SAMPLE_STREAM)


def test_collapsed_features_have_rank_one_and_dead_ones_none(monkeypatch: pytest.MonkeyPatch) -> None:
    singular, _ = spectra(torch.ones(50, 4))
    assert rankme(singular).item() == pytest.approx(1, abs=1e-4)
    state, augment = training(compose(*TINY))
    for p in state.model.parameters():
        torch.nn.init.zeros_(p)
    assert measure_quality(state.model, noise(20), augment, 16, seed=0) == ({}, {"h": [], "z": []})


def test_image_files_are_measured_and_lidar_is_left_out_where_views_would_rotate(tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=6)
    files = all_images(tmp_path)
    memory = all_images(tmp_path, in_memory=True)
    state, augment = training(compose(*TINY, "augment=crop", "augment.blur=0"), channels=3)
    found = measure_quality(state.model, files, augment, 4, seed=0).metrics
    assert found.keys() == NAMES
    for name, value in measure_quality(state.model, memory, augment, 4, seed=0).metrics.items():
        assert "lidar" in name or found[name] == pytest.approx(value, rel=1e-5)  # crops of files have more pixels
    turned = replace(augment, rotation=10.0)
    assert measure_quality(state.model, files, turned, 4, seed=0).metrics.keys() == {
        "quality/h/rankme",
        "quality/z/rankme",
    }
    assert measure_quality(state.model, memory, turned, 4, seed=0).metrics.keys() == NAMES


def test_every_run_has_it_whatever_its_stages(scclr: Run, folder: Path) -> None:
    line = ["augment.rotation=20", "seed=3", *TINY]
    assert scclr("train", "pretrain.quality_every=1", *line) == 0
    (run,) = run_folders(folder)
    metrics = {name: value for name, value in result_of(run)["metrics"].items() if name.startswith("quality/")}
    assert metrics.keys() == NAMES
    rows = rows_of(run)
    assert [f"pretrain/{min(NAMES)}" in row for row in rows] == [row["step"] in (3, 6) for row in rows]
    assert {name: rows[-1][f"pretrain/{name}"] for name in NAMES} == metrics
    spectrum = json.loads((run / "spectrum.json").read_text())
    assert [len(spectrum[layer]) for layer in "hz"] == [16, 16]
    assert math.isclose(sum(spectrum["h"]), 1)
    assert sorted(spectrum["z"], reverse=True) == spectrum["z"]

    for stage in ("probe", "theory"):
        data = [word for word in TINY if word.startswith(("dataset", "probe"))]
        words = ["theory.images=80", "theory.views=2"] if stage == "theory" else []
        assert scclr("train", f"stages=[{stage}]", f"init_from={run}", f"name={stage}", *data, *words) == 0
        (again,) = (folder / "runs" / stage).glob("*/")
        assert {name: result_of(again)["metrics"][name] for name in NAMES} == metrics
        assert (again / "spectrum.json").read_text() == (run / "spectrum.json").read_text()

    only = ["stages=[pretrain]", "name=only", *line]
    assert scclr("train", *only) == 0
    (again,) = (folder / "runs" / "only").glob("*/")
    assert result_of(again)["metrics"] == metrics
    assert not any("quality" in name for row in rows_of(again) for name in row), "every 20 epochs of 2 is never"


def collapsed_row(loss: BalancedLoss | DecoupledLoss, views: int) -> dict[str, float]:
    z = F.normalize(torch.randn(1, 8), dim=1).expand(12, 8)
    terms = loss(*[z] * views)
    return {"attract": terms.attract.item(), "repel": terms.repel.item()}


@pytest.mark.parametrize("kind", [BalancedLoss, DecoupledLoss])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_the_collapsed_value_is_known_at_every_alpha(
    kind: type[BalancedLoss | DecoupledLoss], views: int, alpha: float
) -> None:
    loss = kind(alpha=alpha, temperature=0.4)
    form = loss.logsumexp_form()
    assert form is not None
    row, value = collapsed_row(loss, views), form.collapsed(images=12, views=views)
    assert row["attract"] + row["repel"] == pytest.approx(value, rel=1e-5)
    watch = Watch()
    (line,) = watch.judge(row, value)
    assert "all embeddings coincide" in line
    assert watch.judge(row, value) == [], "once"
    assert Watch().judge({**row, "attract": row["attract"] - 0.02 * value}, value) == []
    assert Watch().judge(row, None) == [], "nothing is said of other losses"


def test_a_rank_that_falls_to_a_quarter_and_repelled_positives_are_said_once_also_after_a_checkpoint() -> None:
    fine = {"attract": -2.0, "repel": 5.0, "effective_rank": 20.0, "admission/repelled": 0.4}
    watch = Watch()
    watch.note(fine)
    assert watch.judge(fine | {"effective_rank": 5.1}, None) == []
    (line,) = watch.judge(fine | {"effective_rank": 4.9}, None)
    assert "fell from 20 to 4.9" in line
    resumed = Watch()
    resumed.load_state_dict(watch.state_dict())
    resumed.note(fine | {"effective_rank": 8.0})
    (line,) = resumed.judge(fine | {"effective_rank": 4.0, "admission/repelled": 0.6}, None)
    assert line.startswith("60% of the positives are pushed apart")
    assert list(resumed.said) == ["rank", "repelled"]


def test_a_collapsed_run_says_so_and_keeps_it(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["stages=[pretrain]", "alpha=0.99", "optimizer.lr=0.02", "pretrain.quality_every=1", *TINY]
    assert scclr("train", *line, "pretrain.epochs=6") == 0
    (run,) = run_folders(folder)
    warnings = result_of(run)["warnings"]
    assert any("all embeddings coincide" in text for text in warnings)
    err = capsys.readouterr().err
    assert all(err.count(text) == 1 for text in warnings)
    healthy = ["stages=[pretrain]", "name=healthy", "loss=align_uniform", *TINY]
    assert scclr("train", *healthy) == 0
    (run,) = (folder / "runs" / "healthy").glob("*/")
    assert not any("coincide" in text for text in result_of(run)["warnings"])

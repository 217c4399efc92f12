"""The report of one run: what its encoder sees, its confusions, its evaluations, its theory."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from report_runs import METRIC, write_run
from sklearn.neighbors import NearestNeighbors

import scclr
from scclr.components import load_splits
from scclr.report import drawing, encoded, write
from scclr.report.answer import answer
from scclr.report.encoded import in_a_plane, neighbours, projection, see
from scclr.report.runs import find
from scclr.report.single import MEANINGS, figures
from scclr.report.single import theory as theory_rows
from scclr.report.study import study

SMALL = ("encoder.widths=[8,16]", "pretrain.epochs=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps; tests do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    return scclr.train(f"runs={folder}", "tracking.mode=disabled", *TINY).directory


def test_neighbours_are_those_of_scikit_learn(trained: Path) -> None:
    run = scclr.load(trained)
    splits = load_splits(run.config)[1]
    h, others = (run.features(part.images).numpy() for part in (splits.test, splits.train))
    search = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(others)
    nearest = search.kneighbors(h, return_distance=False)
    seen = see(trained)
    assert (seen.nearest == splits.train.labels.numpy()[nearest]).mean() > 0.999  # but for ties
    labels = splits.test.labels.numpy()
    assert [labels[i] for i in seen.shown] == sorted({0, 1, 2, 3, 5, 6, 7, 8})  # eight of ten digits
    assert all(i == np.flatnonzero(labels == labels[i])[0] for i in seen.shown)
    for i, strip in zip(seen.shown, seen.strips, strict=True):
        expected = torch.cat([splits.test.images[i : i + 1], splits.train.images[nearest[i]]])
        np.testing.assert_array_equal(strip[..., 0], expected[:, 0].numpy())
        np.testing.assert_array_equal(strip[..., 0], strip[..., 2])
    right = splits.train.labels.numpy()[nearest] == labels[:, None]
    caption = neighbours(seen).caption
    assert f"n = {len(labels)} test images {100 * right.mean():.1f} % of the 5 nearest" in caption
    assert f"and {100 * right[:, 0].mean():.1f} % of the nearest" in caption
    assert f"5 nearest of {len(splits.train)} training images" in caption


def test_right_and_wrong_are_told_apart_without_colour() -> None:
    nearest = np.array([[0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    strip = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    seen = encoded.Seen(np.zeros((2, 3)), np.array([0, 1]), nearest, [0, 1], [strip, strip], ("cat", "dog"), (10, 90))
    with drawing.style():
        picture = neighbours(seen)
    svg = ET.fromstring(picture.svg)
    words = ["".join(text.itertext()).strip() for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("\N{CHECK MARK}") == 9
    assert words.count("\N{BALLOT X} dog") == 1
    assert (words.count("cat"), words.count("dog")) == (1, 1)  # the test images
    assert len(re.findall("stroke-dasharray", picture.svg)) == 1
    assert "5 nearest of 10 of the 90 training images" in picture.caption
    assert "90.0 % of the 5 nearest and 100.0 % of the nearest" in picture.caption


def test_images_keep_their_colours() -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(torch.uint8)
    np.testing.assert_array_equal(encoded._in_colour(images), images.permute(0, 2, 3, 1))
    grey = encoded._in_colour(images[:, :2])  # of two channels the mean
    assert grey.shape == (2, 4, 5, 3)
    np.testing.assert_array_equal(grey[..., 1], images[:, :2].float().mean(1).to(torch.uint8))


def test_images_are_taken_evenly(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = load_splits(scclr.load(trained).config)[1]
    monkeypatch.setattr(encoded, "IMAGES", 7)
    monkeypatch.setattr(encoded, "CANDIDATES", 20)
    seen = see(trained)
    every = [i * len(splits.test) // 7 for i in range(7)]
    assert seen.labels.tolist() == splits.test.labels[every].tolist()
    assert seen.among == (20, len(splits.train))


def test_the_page_of_a_trained_run(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / trained.name
    shutil.copytree(trained, run)
    page, _, pictures = write([run])
    assert {"embedding", "neighbours", "confusion", "confusion1", "spectrum"} <= {one.name for one in pictures}
    text = page.read_text()
    assert "Nearest training images" in text
    assert "There are no plots" not in text
    (run / "last.pt").unlink()
    pictures, notes = figures(find([run]).runs[0])
    assert [note.split(":")[0] for note in notes] == ["There are no plots of what the encoder sees"]
    assert {one.name for one in pictures} == {"confusion", "confusion1"}


UMAP = """
import numpy as np

class UMAP:
    def __init__(self, *, n_neighbors, metric, random_state, n_jobs):
        assert (n_neighbors, metric, random_state, n_jobs) == (15, "cosine", 0, 1)

    def fit_transform(self, h):
        return np.stack([np.arange(len(h)), h[:, 0]], 1)
"""


def test_the_plane_is_that_of_umap_where_it_is_installed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "IMAGES", 40)
    seen = see(trained)
    assert projection(seen).caption.startswith("Principal components of h of n = 40 test images")
    (tmp_path / "umap.py").write_text(UMAP)
    monkeypatch.syspath_prepend(tmp_path)
    assert projection(seen).caption.startswith("UMAP (cosine, 15 neighbours) of h of n = 40 test images")
    assert in_a_plane(seen.h)[0][:, 0].tolist() == list(range(40))


def evaluation(run: Path, stem: str, dataset: str, **metrics: float) -> None:
    (run / "evaluations").mkdir(exist_ok=True)
    named = {name.replace("__", "/").replace("_v", "-v"): value for name, value in metrics.items()}
    record = {"protocol": stem.split("-")[-2], "dataset": dataset, "metrics": named}
    (run / "evaluations" / f"{stem}.json").write_text(json.dumps(record))


def test_evaluations_are_on_the_page_and_can_be_compared(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, *SMALL, f"alpha={alpha}", f"seed={seed}", metrics={METRIC: 0.9 + seed / 1000})
        for alpha in (0.3, 0.5)
        for seed in (0, 1)
    ]
    for i, run in enumerate(folders):
        both = {"knn_v1__top1": 0.5 + i / 10, "baseline__pixels__knn_v1__top1": 0.25}
        evaluation(run, "mnist-knn-0a1b2c3d", "mnist", **both)
    evaluation(folders[0], "digits-ncc-00000001", "digits", ncc_v1__top1=0.125)
    evaluation(folders[0], "digits-ncc-00000002", "digits", ncc_v1__top1=0.375)
    found = study(find([tmp_path]).runs, "mnist/knn-v1/top1", None)
    assert [group.estimate.mean for group in found.groups] == pytest.approx([0.55, 0.75])
    assert study(find([tmp_path]).runs, None, None).metric == METRIC
    text = write([tmp_path], "mnist/knn-v1/top1")[0].with_suffix(".md").read_text()
    assert "Beside that: raw pixels 25.00 ± 0.00 %" in text
    assert "mnist/baseline/pixels/knn-v1/top1" in (tmp_path / "report" / "results.csv").read_text().split("\n")[0]
    with pytest.raises(scclr.UserError, match="did you mean mnist/knn-v1/top1"):
        study(find([tmp_path]).runs, "mnist/knn-v1/top", None)

    text = write([folders[0]])[0].with_suffix(".md").read_text()
    assert "| mnist/knn-v1/top1, % | 50.00 | - | 25.00 |" in text
    assert "| digits-00000001/ncc-v1/top1, % | 12.50 | - | - |" in text  # two options of one protocol
    assert "| digits-00000002/ncc-v1/top1, % | 37.50 | - | - |" in text
    (folders[0] / "evaluations" / "mnist-knn-0a1b2c3d.json").write_text("{")
    text = write([folders[0]])[0].read_text()
    assert "mnist-knn-0a1b2c3d.json: damaged" in text
    assert "90.00 %" in text


def test_one_run_has_its_confusions_and_theory(tmp_path: Path) -> None:
    run = write_run(tmp_path, *SMALL, metrics={METRIC: 0.75}, rows=6)
    np.savez(run / "confusion.npz", **{"logreg-v1": np.array([[3, 1], [0, 4]]), "baseline/pixels/logreg-v1": np.eye(2)})
    (run / "spectrum.json").write_text(json.dumps({"h": [0.7, 0.2, 0.1], "z": [0.9, 0.1]}))
    path, found, _ = write([run])
    assert answer(found) == ["logreg-v1/top1 is 75.00 % of one seed, so there is no interval: add seed=0,1,2."]
    assert {file.stem for file in path.parent.glob("*.svg")} == {"confusion", "spectrum", "forces", "learning", "slack"}
    text = path.read_text()
    assert "87.50 % lie on the diagonal" in text
    assert "There are no plots of what the encoder sees" in text  # these files hold no weights
    (run / "confusion.npz").write_bytes(b"PK\3\4")
    assert "confusion.npz: damaged" in figures(find([run]).runs[0])[1][1]
    write_run(tmp_path, *SMALL, "seed=1", metrics={METRIC: 0.75})
    same = study(find([tmp_path]).runs, None, None)
    text = "logreg-v1/top1 is 75.00 % of 2 seeds, all the same, so there is no interval: add seed=0,1,2,3."
    assert answer(same) == [text]


def test_every_row_of_the_theory_has_a_sentence(tmp_path: Path) -> None:
    from scclr.theory.report import BIAS_ROWS, BOUND_ROWS, COLLAPSE_ROWS

    names = [*BIAS_ROWS, *COLLAPSE_ROWS, *BOUND_ROWS]
    assert set(MEANINGS) == {*names, "alpha_mis", "alpha_c", "alpha_col"}
    estimate = {"value": 0.25, "se": 0.01}
    space = {"bias": dict.fromkeys(BIAS_ROWS, estimate), "collapse": dict.fromkeys(COLLAPSE_ROWS, 2.0)}
    found = {
        "z": space, "h": space, "temperature": 0.5,
        "bound": [{"temperature": t} | {name: {"value": t, "se": None} for name in BOUND_ROWS} for t in (0.1, 0.5)],
        "thresholds": {"alpha_mis": 0.05, "alpha_c": None, "alpha_col": 0.8},
    }  # fmt: skip
    (tmp_path / "theory.json").write_text(json.dumps(found))
    rows = theory_rows(tmp_path)
    assert len(rows) == len(names) + 2
    assert rows[0][1:3] == ("0.2500 ± 0.0100", "0.2500 ± 0.0100")
    assert rows[-3][1] == "0.5000"  # the bound at the temperature of the training
    (tmp_path / "theory.json").write_text('{"z": 1}')
    assert theory_rows(tmp_path) == []

"""Pretraining on one dataset and evaluation on another."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, compose, result_of, rows_of, run_folders
from image_files import write_image

from scclr.components import check, load_splits, load_transfers, make_models, prepare
from scclr.config.errors import UserError

DIGITS = {"_target_": "scclr.datasets.digits.Digits", "validation": 0.2, "test": 0.25, "mean": [0.3], "std": [0.4]}


@pytest.fixture
def flat(folder: Path) -> list[str]:
    """The words of a run that pretrains on images without labels."""
    for i in range(20):
        write_image(folder / "flat" / f"{i}.png", level=10 * i)
    words = ["dataset=imagefolder", "dataset.root=flat", "dataset.labels=null", "dataset.image_size=8", "augment=crop"]
    return [*words, *TINY[1:], "pretrain.batch_size=8", "device=cpu"]


def elsewhere(*words: str, **changes: object) -> object:
    config = compose(*words)
    config.probe.dataset = {**DIGITS, **changes}
    return config


def test_the_encoder_is_evaluated_on_the_other_data(flat: list[str]) -> None:
    config = elsewhere(*flat)
    check(config)
    splits, evaluated = load_splits(config)
    assert splits.classes == ()
    assert len(evaluated.classes) == 10
    assert splits.train.images.shape[1] == 3
    model, _ = make_models(config, splits, evaluated)
    assert model.channels == 3
    same, also = load_splits(compose(*flat, "stages=[pretrain]", "pretrain.knn_every=0"))
    assert same is also


def test_the_other_data_is_a_part_of_what_a_run_is(flat: list[str]) -> None:
    folders = {
        prepare(config, [])[1].directory for config in (elsewhere(*flat), elsewhere(*flat, limit=300), elsewhere(*flat))
    }
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([], {"limit": 0}, "^probe.dataset: dataset: limit=0"),
        ([], {"_target_": "scclr.datasets.digits.Digit"}, r"^probe\.dataset: .*did you mean Digits\?"),
        ([], {"mean": [0.3] * 4, "std": [0.3] * 4}, "the encoder takes images of 3 channels, and these have 4"),
        (["stages=[pretrain]", "pretrain.knn_every=0"], {}, r"stages=\[pretrain\] would ignore probe\.dataset"),
        (["stages=[probe]", "init_from=x"], {}, "x: no such file"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused(words: list, changes: dict, message: str, flat: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        check(elsewhere(*flat, *words, **changes))


def test_a_probe_alone_needs_no_second_dataset(flat: list[str], folder: Path) -> None:
    (folder / "x.pt").touch()
    with pytest.raises(UserError, match=r"stages=\[probe\] would ignore probe\.dataset: type dataset=<name>"):
        check(elsewhere(*flat, "stages=[probe]", "init_from=x.pt"))


@pytest.mark.parametrize("labels", ["images without labels", "one class"])
def test_the_other_data_needs_labels(labels: str, flat: list[str], folder: Path) -> None:
    if labels == "one class":
        (folder / "tree").mkdir()
        (folder / "flat").rename(folder / "tree" / "only")
        (folder / "tree").rename(folder / "flat")
        flat = [*flat, "dataset.validation=0.2"]
    config = compose(*flat)
    config.probe.dataset = {**config.dataset, **({"labels": "folders"} if labels == "one class" else {})}
    with pytest.raises(UserError, match=r"^probe\.dataset: (these images have no labels|all images are of one class)"):
        load_splits(config)


def test_a_transformer_is_refused_on_images_of_another_size(flat: list[str]) -> None:
    words = [word for word in flat if not word.startswith("encoder.")]
    config = elsewhere(*words, "encoder=vit_tiny", "encoder.depth=1", "encoder.patch=2", "dataset.image_size=16")
    splits, evaluated = load_splits(config)
    assert evaluated.test.images.shape[-1] == 8
    with pytest.raises(UserError, match="the encoder takes no images of 8 x 8 pixels"):
        make_models(config, splits, evaluated)


def test_a_run_is_evaluated_on_the_other_data(flat: list[str], scclr: Callable[..., int], folder: Path) -> None:
    assert scclr("train", *flat, "probe.dataset=digits", "probe.dataset.limit=300") == 0
    (run,) = run_folders(folder)
    result = result_of(run)
    assert result["config"]["probe"]["dataset"]["limit"] == 300
    assert result["metrics"]["baseline/pixels/logreg-v1/top1"] > 0.8, "digits, not the grey squares"
    assert any(name.endswith("knn") for row in rows_of(run) for name in row)


@pytest.fixture
def squares(folder: Path) -> list[str]:
    """The words for grey squares of 28 pixels and two shades, as a dataset to transfer to."""
    labels = np.arange(120) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (120, 28, 28)) + 120 * labels[:, None, None]
    np.savez(folder / "squares.npz", images=pixels.astype(np.uint8), labels=labels)
    return [f"probe.transfer.arrays.{word}" for word in ("root=squares.npz", "mean=[0.4]", "std=[0.3]")]


def test_transfer_comes_beside_the_data_of_the_run(
    squares: list[str], scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "stages=[pretrain,probe]", "probe.protocols=[logreg,sgd]", "probe.protocols.sgd.augment=false"]
    assert scclr("train", *words) == 0
    assert scclr("train", *words, "probe.transfer=[arrays,digits]", *squares, "probe.transfer.digits.limit=300") == 0
    without, result = sorted(map(result_of, run_folders(folder)), key=lambda found: len(found["metrics"]))
    assert {name: result["metrics"][name] for name in without["metrics"]} == without["metrics"]
    added = {name for name in result["metrics"] if name not in without["metrics"]}
    assert {"arrays/logreg-v1/top1", "arrays/sgd-v1/top1", "arrays/baseline/pixels/logreg-v1/top1"} < added
    assert result["metrics"]["arrays/logreg-v1/top1"] > 0.9, "two shades"
    same = [name for name in without["metrics"] if name.split("/")[-2] in ("logreg-v1", "sgd-v1")]
    assert [result["metrics"][f"digits/{name}"] for name in same] == [result["metrics"][name] for name in same]
    assert result["chosen"]["digits/sgd-v1"] == result["chosen"]["sgd-v1"]
    assert result["encoder_sha256"] == without["encoder_sha256"]
    confusion = np.load(max(run_folders(folder), key=lambda run: len(result_of(run)["metrics"])) / "confusion.npz")
    assert confusion["arrays/logreg-v1"].shape == (2, 2)
    assert "arrays/pretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe.transfer=digits"], r"give one list of datasets, as in probe.transfer=\[mnist,svhn\]"),
        (["probe.transfer=[]"], "give one list of datasets"),
        (["probe.transfer=[digit]"], "no such dataset; did you mean digits"),
        (["probe.transfer.digits.limit=300"], r"digits is not chosen; type probe.transfer=\[digits\]"),
        (["probe.transfer=[digits]", "probe.transfer.digits.limt=300"], "did you mean probe.transfer.digits.limit"),
        (["probe.transfer=[digits]", "probe.transfer.digits.limit=0"], "probe.transfer.digits: limit=0"),
        (["probe.transfer=[digits]", "stages=[pretrain]"], "would ignore probe.transfer"),
    ],
)
def test_transfer_that_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(compose(*words))
    assert "\n" not in str(caught.value)


def test_transfer_to_images_that_the_encoder_refuses(squares: list[str], folder: Path) -> None:
    words = ["encoder=vit_tiny", "encoder.depth=1", "encoder.patch=2", "probe.transfer=[arrays]", *squares]
    config = compose(*words)
    assert prepare(config, [])[1].directory != prepare(compose(*words[:3]), [])[1].directory
    splits, evaluated = load_splits(config)
    with pytest.raises(UserError, match="the encoder takes no images of 28 x 28 pixels"):
        make_models(config, splits, evaluated, *load_transfers(config).values())
    labels = np.load("squares.npz")["labels"]
    np.savez("squares.npz", images=np.load("squares.npz")["images"], labels=0 * labels)
    with pytest.raises(UserError, match=r"^probe\.transfer\.arrays: .*one class"):
        load_transfers(config)

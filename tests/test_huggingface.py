"""Data sets of Hugging Face's library: folders of save_to_disk, parquet files, and its cache, without a network."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, result_of, run_folders
from image_files import COLOUR
from PIL import Image

with warnings.catch_warnings(action="ignore"):
    datasets = pytest.importorskip("datasets")

from scclr.config.errors import UserError
from scclr.datasets.huggingface import HuggingFace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
random = np.random.default_rng(0)
PIXELS = random.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "owl"]
SETTINGS = {**COLOUR, "test": 0.2, "image_size": 16, "workers": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the library in a folder of the test, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it reaches for the network"))
    return folder


def png(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).convert(mode).save(file, format="png")
        return file.getvalue()


def table(n: int = 30, **columns: Any) -> Any:
    """``n`` images of three classes by turns."""
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    rows = {"img": [{"bytes": png(x)} for x in PIXELS[:n]], "label": [i % 3 for i in range(n)], "text": ["x"] * n}
    features |= {name: features["label"] for name in columns if name not in features}
    return datasets.Dataset.from_dict({**rows, **columns}, datasets.Features(features))


def source(root: Path | str, **changes: Any) -> HuggingFace:
    return HuggingFace(**{**SETTINGS, "root": str(root), "images": "img", **changes})


def write(root: Path, kind: str) -> Path:
    """Splits train and test, of 30 and 12 images."""
    both = {"train": table(), "test": table(12)}
    if kind == "saved":
        datasets.DatasetDict(both).save_to_disk(root)
        return root
    for split, part in both.items():
        path = root / (f"{split}-00000-of-00001.parquet" if kind == "parquet" else f"{split}/0000.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(path)
    return root


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["saved", "parquet", "folders"])
def test_every_form_on_the_disk_gives_the_same_images(kind: str, in_memory: bool, tmp_path: Path) -> None:
    splits = source(write(tmp_path / "data", kind), in_memory=in_memory).load()
    assert splits.classes == tuple(NAMES)
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (30, 12)
    (images,) = splits.test.blocks(64)
    assert torch.equal(images, torch.from_numpy(PIXELS[:12]).permute(0, 3, 1, 2))
    assert splits.test.labels.tolist() == [i % 3 for i in range(12)]


def test_a_name_is_looked_up_in_the_cache_only(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"^nobody/nothing: Couldn't find cache for nobody/nothing; give dataset\.root="
    ):
        source("nobody/nothing").load()
    write(tmp_path / "animals", "parquet")
    with warnings.catch_warnings(action="ignore"):
        datasets.load_dataset(str(tmp_path / "animals"))
    (name,) = (path.name for path in cache.iterdir() if path.is_dir())
    splits = source(name).load()
    assert len(splits.test) == 12


def test_copies_have_one_digest_and_other_data_has_another(tmp_path: Path) -> None:
    digests = [source(write(tmp_path / f"{i}", kind)).digest() for i, kind in enumerate(["saved", "saved", "parquet"])]
    assert len({*digests}) == 1
    datasets.DatasetDict({"train": table(27)}).save_to_disk(tmp_path / "other")
    assert source(tmp_path / "other").digest() not in digests
    assert source(tmp_path / "0", labels=None).digest() not in digests


def test_labels_of_every_kind(tmp_path: Path) -> None:
    data = table().remove_columns("label").add_column("name", ["b", "a"] * 15).add_column("number", [7, 3, 5] * 10)
    data.to_parquet(tmp_path / "train.parquet")
    assert source(tmp_path, labels="name").load().classes == ("a", "b")
    splits = source(tmp_path / "train.parquet", labels="number").load()
    assert splits.classes == ("3", "5", "7")
    assert len(splits.test) == 6
    unlabelled = source(tmp_path, labels=None).load()
    assert unlabelled.classes == ()
    assert len(unlabelled.pretrain) + len(unlabelled.validation) == 30


def test_a_published_validation_split_is_used(tmp_path: Path) -> None:
    datasets.DatasetDict({"a": table(), "b": table(6), "c": table(9)}).save_to_disk(tmp_path)
    splits = source(tmp_path, train_split="a", validation_split="b", test_split="c").load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 6, 9)
    assert not splits.refit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": "image"},
            r"dataset\.images=image: .* no such column; there are img, label, text.*did you mean img",
        ),
        ({"labels": "labels"}, r"dataset\.labels=labels: .* no such column; .*did you mean label\?"),
        ({"images": "text"}, r"dataset\.images=text: this column of .* has no image files, but string"),
        (
            {"train_split": "trian"},
            r"dataset\.train_split=trian: .* no such split; there are train, test; did you mean",
        ),
        ({"test_split": "val"}, r"dataset\.test_split=val: .* no such split; there are train, test"),
        ({"mean": [0.5], "std": [0.5]}, "the images have 3 channels"),
    ],
)
def test_what_is_not_there_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        source(write(tmp_path / "data", "saved"), **changes).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label": [0, None, 2] * 10},
            "10 of 30 rows of .* have no label; give labelled splits, or dataset.labels=null",
        ),
        ({"label": [0, -1, 2] * 10}, "10 of 30 rows"),
        (
            {"img": [{"bytes": b"no image"}] * 30},
            r"data: train, row \d+: cannot identify image file; take this row out",
        ),
        ({"img": [None] * 30}, r"data: train, row \d+: there is no image"),
    ],
)
def test_bad_rows_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(**columns)}).save_to_disk(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        source(tmp_path / "data").load()
    assert "\n" not in str(caught.value)


def test_parquet_files_of_other_writers(tmp_path: Path) -> None:
    """Without the library's own description of the columns; an image is bytes, or a path."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    labels = [i % 3 for i in range(30)]
    write_table(pa.table({"img": [png(x) for x in PIXELS], "label": labels}), tmp_path / "bytes.parquet")
    assert len(source(tmp_path / "bytes.parquet").load().test) == 6
    paths = [{"bytes": None, "path": "http://127.0.0.1:9/gone.png"}] * 30
    write_table(pa.table({"img": paths, "label": labels}), tmp_path / "paths.parquet")
    with pytest.raises(UserError, match=r"paths\.parquet: train, row \d+: .*No such file"):
        source(tmp_path / "paths.parquet").load()


def test_a_class_that_is_never_trained_on_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(label=[0, 1] * 15), "test": table(12)}).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"the test images have 1 classes that the others have not, such as \['owl'\]"):
        source(tmp_path).load()


@pytest.mark.parametrize(
    "content", [{}, {"x.txt": b"x"}, {"train.parquet": b"no parquet"}, {"dataset_info.json": b"{"}]
)
def test_a_folder_of_something_else_is_refused(content: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, text in content.items():
        (root / name).write_bytes(text)
    with pytest.raises(UserError, match=r"^[^\n]*give dataset\.root=<a folder of save_to_disk[^\n]*$"):
        source(root).load()


def test_images_of_every_mode_become_colour(tmp_path: Path) -> None:
    encoded = [{"bytes": png(x, mode)} for x, mode in zip(PIXELS, ["L", "RGBA", "P"] * 10, strict=True)]
    datasets.DatasetDict({"train": table(img=encoded)}).save_to_disk(tmp_path)
    assert source(tmp_path, image_size=8, resize=12).load().train.images.shape[1:] == (3, 8, 8)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'scclr\[datasets\]'"):
        source("x")


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_a_run(in_memory: str, scclr: Callable[..., int], folder: Path) -> None:
    write(folder / "data", "saved")
    data = [
        "dataset=huggingface",
        "dataset.root=data",
        "dataset.images=img",
        "dataset.image_size=8",
        "dataset.workers=0",
    ]
    words = [*data, f"dataset.in_memory={in_memory}", "dataset.resize=12", "augment=crop", *TINY[1:], "device=cpu"]
    assert scclr("train", *words, "pretrain.batch_size=8", "dataset.validation=0.2") == 0
    (run,) = run_folders(folder)
    assert 0 <= result_of(run)["metrics"]["logreg-v1/top1"] <= 1

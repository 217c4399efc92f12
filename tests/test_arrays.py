"""Images that NumPy saved: every layout and type, what is refused, and runs on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, result_of, run_folders
from image_files import GREY, truncate

from scclr.config.errors import UserError
from scclr.datasets.arrays import Arrays, MappedArray
from scclr.encoders.convnet import ConvNet

random = np.random.default_rng(0)
PIXELS = random.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(40) % 4


def arrays(root: Path, channels: int = 3, **changes: Any) -> Arrays:
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    return Arrays(**{**GREY, **statistics, "test": 0.25, "root": str(root), **changes})


def save(root: Path, **content: np.ndarray) -> Path:
    """One .npz, or a folder of .npy files."""
    if root.suffix == ".npz":
        np.savez(root, **content)
    else:
        root.mkdir(parents=True, exist_ok=True)
        for name, array in content.items():
            np.save(root / f"{name}.npy", array)
    return root


def whole(source: Arrays) -> torch.Tensor:
    images = source.read().train.images
    return images if isinstance(images, torch.Tensor) else next(source.read().train.blocks(1000))


@pytest.mark.parametrize("place", ["data.npz", "data"])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "grey", "twelve", "float32", "float16"])
def test_every_layout_gives_the_same_images(layout: str, in_memory: bool, place: str, tmp_path: Path) -> None:
    pixels = {"grey": PIXELS[:, :1], "twelve": PIXELS[:, [0, 1, 2] * 4]}.get(layout, PIXELS)
    stored = {
        "NHWC": pixels.transpose(0, 2, 3, 1),
        "grey": pixels[:, 0],
        "float32": (pixels / 255).astype(np.float32),
        "float16": (pixels / 255).astype(np.float16),
    }.get(layout, pixels)
    root = save(tmp_path / place, images=stored, labels=LABELS)
    source = arrays(root, pixels.shape[1], in_memory=in_memory)
    if not in_memory and (place == "data.npz" or "float" in layout):
        with pytest.raises(
            UserError, match=r"images.*only \.npy files of uint8 can be mapped; type dataset\.in_memory"
        ):
            source.load()
        return
    assert source.image_size == 8
    assert torch.equal(whole(source), torch.from_numpy(pixels))
    splits = source.load()
    assert isinstance(splits.train.images, torch.Tensor if in_memory else MappedArray)
    assert splits.classes == ("0", "1", "2", "3")
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (30, 10)


def test_test_images_in_the_same_file_or_in_another(tmp_path: Path) -> None:
    train, test = (PIXELS, LABELS.reshape(-1, 1)), (PIXELS[:8], LABELS[:8])
    one = save(tmp_path / "one.npz", x=train[0], y=train[1], xt=test[0], yt=test[1])
    names = {"images": "x", "labels": "y", "test_images": "xt", "test_labels": "yt"}
    two = tmp_path / "two"
    two.mkdir()
    save(two / "train.npz", x=train[0], y=train[1])
    save(two / "test.npz", x=test[0], y=test[1])
    other = {"images": "train/x", "labels": "train/y", "test_images": "test/x", "test_labels": "test/y"}
    for source in (arrays(one, **names), arrays(two, **other)):
        splits = source.load()
        assert torch.equal(splits.test.images, torch.from_numpy(PIXELS[:8]))
        assert splits.test.labels.tolist() == LABELS[:8].tolist()
        assert len(splits.train) + len(splits.validation) == 40


@pytest.mark.parametrize("labels", [LABELS * 3 + 5, np.array(["a", "b", "c", "d"])[LABELS], LABELS > 1])
def test_labels_may_be_any_numbers_or_text(labels: np.ndarray, tmp_path: Path) -> None:
    splits = arrays(save(tmp_path / "data.npz", images=PIXELS, labels=labels)).load()
    assert splits.classes == tuple(str(name) for name in np.unique(labels))
    assert set(splits.test.labels.tolist()) == set(range(len(splits.classes)))


def test_without_labels(tmp_path: Path) -> None:
    splits = arrays(save(tmp_path / "data", images=PIXELS), labels=None).load()
    assert splits.classes == ()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 0)
    assert set(splits.pretrain.labels.tolist()) == {-1}
    assert splits.groups == {}


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    a, b = (save(tmp_path / name, images=PIXELS, labels=LABELS) for name in ("a.npz", "b"))
    assert arrays(a).digest() == arrays(b).digest()
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    assert arrays(save(tmp_path / "c", images=changed, labels=LABELS)).digest() != arrays(a).digest()
    other = LABELS.copy()
    other[7] = 0
    assert arrays(save(tmp_path / "d", images=PIXELS, labels=other)).digest() != arrays(a).digest()


FLOATS = PIXELS.astype(np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": FLOATS}, r"images(\.npy)?: its floats reach from 0 to 255; give uint8, or floats from 0 to 1"),
        ({"images": FLOATS / 255 - 0.1}, "its floats reach from -0.1 to 0.9"),
        ({"images": np.where(FLOATS > 200, np.nan, 0)}, "its floats reach from nan to nan"),
        ({"images": PIXELS.astype(np.int64)}, "has int64 numbers; give uint8, or floats"),
        ({"images": PIXELS.astype(complex)}, "has complex128 numbers"),
        ({"images": PIXELS[..., None]}, r"has the shape \[40, 3, 8, 8, 1\]; give images"),
        ({"images": PIXELS[:0]}, r"has the shape \[0, 3, 8, 8\]; give images"),
        ({"images": PIXELS[..., :6]}, r"has the shape \[40, 3, 8, 6\]; give square images"),
        (
            {"images": PIXELS[:, :2]},
            r"\[40, 2, 8, 8\], and dataset\.mean=.* is of 3 channels; type dataset\.mean=\[0\.\d+,",
        ),
        (
            {"images": PIXELS[:, 0]},
            r"\[40, 8, 8\], and dataset\.mean=.* is of 3 channels; type dataset\.mean=\[0\.\d+\]",
        ),
        ({"images": np.array([{}] * 40)}, r"(allow_pickle=False|Python objects).*; save it with numpy"),
        ({"labels": LABELS[:30]}, r"labels(\.npy)? has the shape \[30\]: give one label for each of the 40 images"),
        ({"labels": np.eye(4)[LABELS]}, r"labels(\.npy)? has the shape \[40, 4\]: give one label"),
        ({"labels": LABELS / 4}, r"labels(\.npy)? has float64 numbers; give whole numbers or text"),
        (
            {"labels": LABELS - 1},
            r"labels(\.npy)?: 10 labels are negative, such as -1; .*dataset\.labels=null if there are none",
        ),
        ({"labels": np.array([{}] * 40)}, r"(allow_pickle=False|Python objects).*; save it with numpy"),
    ],
)
@pytest.mark.parametrize("place", ["data.npz", "data"])
def test_bad_arrays_are_refused_in_one_line(content: dict, message: str, place: str, tmp_path: Path) -> None:
    root = save(tmp_path / place, **{"images": PIXELS, "labels": LABELS, **content})
    with pytest.raises(UserError, match=message) as caught:
        arrays(root).load()
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_proposed_statistics_are_those_of_the_channels(tmp_path: Path) -> None:
    root = save(tmp_path / "data.npz", images=PIXELS.transpose(0, 2, 3, 1), labels=LABELS)
    with pytest.raises(UserError) as caught:
        arrays(root, 1).load()
    typed = dict(word.split("=") for word in str(caught.value).split("type ")[1].split(", which")[0].split(" "))
    values = {
        key.removeprefix("dataset."): [float(x) for x in text.strip("[]").split(",")] for key, text in typed.items()
    }
    assert values["mean"] == pytest.approx((PIXELS / 255).mean((0, 2, 3)), abs=1e-4)
    assert values["std"] == pytest.approx((PIXELS / 255).std((0, 2, 3)), abs=1e-4)
    arrays(root, **values).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "image"}, r"data\.npz: no array image; there are images, labels; did you mean images\?"),
        ({"labels": "label"}, r"data\.npz: no array label; .*did you mean labels\?"),
        ({"test_images": "images", "test_labels": "few"}, "no array few"),
        ({"root": "nowhere"}, r"nowhere: no such file or folder; give an \.npz file, or a folder"),
        ({"root": __file__}, r"test_arrays\.py: give an \.npz file"),
    ],
)
def test_what_is_not_there_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    root = save(tmp_path / "data.npz", images=PIXELS, labels=LABELS)
    with pytest.raises(UserError, match=message):
        arrays(**{"root": root, **changes}).load()


def test_a_missing_file_of_a_folder_is_named(tmp_path: Path) -> None:
    root = save(tmp_path / "data", images=PIXELS, labels=LABELS)
    with pytest.raises(UserError, match=r"image\.npy: no such file; there are images, labels; did you mean images\?"):
        arrays(root, images="image").load()
    with pytest.raises(UserError, match=r"train\.npz: no such file; the folder has no \.npz files"):
        arrays(root, images="train/x").load()


@pytest.mark.parametrize("place", ["data.npz", "data"])
def test_a_damaged_file_is_named(place: str, tmp_path: Path) -> None:
    root = save(tmp_path / place, images=PIXELS, labels=LABELS)
    file = root if root.is_file() else root / "images.npy"
    truncate(file)
    with pytest.raises(UserError, match=rf"{file.name}: .*; save it with numpy\.save or numpy\.savez"):
        arrays(root).load()
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"{file.name}: .*; save it with numpy\.save or numpy\.savez"):
        arrays(root).load()


def test_a_test_class_without_training_images_is_named(tmp_path: Path) -> None:
    root = save(tmp_path / "data.npz", images=PIXELS, labels=LABELS % 3, x=PIXELS, y=LABELS)
    with pytest.raises(UserError, match=r"y has 1 classes that labels has not, such as \['3'\]"):
        arrays(root, test_images="x", test_labels="y").load()


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.datasets.arrays.memory_limit", lambda: 1000)
    for place in ("data.npz", "data"):
        root = save(tmp_path / place, images=PIXELS, labels=LABELS)
        message = r"takes 0\.0 GiB of 0\.0 GiB of memory: save it as a \.npy file, and type dataset\.in_memory=false"
        with pytest.raises(UserError, match=message):
            arrays(root).load()
    arrays(root, in_memory=False).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ""}, "a name of an array is empty"),
        ({"test_images": "x"}, "test_images and test_labels belong together"),
        ({"labels": None, "test_images": "x", "test_labels": "y"}, "without labels there is nothing to test"),
    ],
)
def test_bad_arguments(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        arrays(tmp_path, **changes)


RUN = ["dataset=arrays", "dataset.root=data", "dataset.validation=0.2", "augment=crop", "device=cpu", *TINY[1:]]
FIVE = ["dataset.mean=[0.5,0.5,0.5,0.5,0.5]", "dataset.std=[0.2,0.2,0.2,0.2,0.2]"]


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_a_run(in_memory: str, scclr: Callable[..., int], folder: Path) -> None:
    save(folder / "data", images=PIXELS[:, 0], labels=LABELS)
    assert scclr("train", *RUN, "pretrain.batch_size=8", f"dataset.in_memory={in_memory}") == 0
    (run,) = run_folders(folder)
    assert 0 <= result_of(run)["metrics"]["logreg-v1/top1"] <= 1


def test_images_of_five_channels_are_trained_on_and_evaluated(
    scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder / "data", images=PIXELS[:, [0, 1, 2, 0, 1]], labels=LABELS)
    for exact in ("true", "false"):
        assert scclr("train", *RUN, *FIVE, "pretrain.batch_size=8", f"augment.exact={exact}", "runs=trained") == 0
    capsys.readouterr()
    torch.save(ConvNet(in_channels=5, widths=[8, 16], stem_stride=1).state_dict(), "five.pth")
    words = ["stages=[probe]", "init_from=five.pth", "encoder.widths=[8,16]", *RUN[:3], *FIVE, *TINY[-2:]]
    assert scclr("train", *words) == 1
    shapes = "conv.weight [8, 5, 3, 3] instead of [8, 3, 3, 3]; type init_mean and init_std of 5 numbers"
    assert shapes in capsys.readouterr().err
    assert scclr("train", *words, *(word.replace("dataset.", "init_") for word in FIVE)) == 0
    (run,) = run_folders(folder)
    assert 0 <= result_of(run)["metrics"]["logreg-v1/top1"] <= 1

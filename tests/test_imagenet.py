"""ImageNet and its subsets: small trees and lists in their published layout, and what is said of missing parts."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from image_files import COLOUR, write_image

from scclr.config.errors import UserError
from scclr.datasets import imagenet, imagenet_lt
from scclr.datasets.files import Files
from scclr.datasets.imagenet import ImageNet
from scclr.datasets.imagenet100 import IDS, ImageNet100
from scclr.datasets.imagenet_lt import ImageNetLT
from scclr.datasets.tiny_imagenet import TinyImageNet

NAMES = [f"n{i:08d}" for i in range(3)]
OPEN = {**COLOUR, "image_size": 8, "workers": 0}


def write_tree(root: Path, names: Sequence[str] = NAMES, train: int = 8, val: int = 2) -> None:
    for c, name in enumerate(names):
        for i in range(train):
            write_image(root / "train" / name / f"{name}_{i}.JPEG", level=10 * c % 250)
        for i in range(val):
            write_image(root / "val" / name / f"ILSVRC2012_val_{c * val + i:08d}.JPEG", level=10 * c % 250)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes stand for a thousand, or two hundred."""
    for module in (imagenet, imagenet_lt):
        monkeypatch.setattr(module, "CLASSES", 3)
    monkeypatch.setattr(ImageNet, "counts", (24, 6))
    monkeypatch.setattr(ImageNet100, "counts", (200, 100))
    monkeypatch.setattr(ImageNetLT, "counts", {"train": 14, "val": 3, "test": 6})
    monkeypatch.setattr(TinyImageNet, "counts", (24, 6))


def full(root: Path, source: type[ImageNet] = ImageNet, **changes: object) -> ImageNet:
    return source(**{**OPEN, "root": str(root), "in_memory": False, **changes})


def test_imagenet100_has_a_hundred_wordnet_ids() -> None:
    assert len(set(IDS.split())) == len(IDS.split()) == len(re.findall(r"\bn\d{8}\b", IDS)) == 100


def test_imagenet(tmp_path: Path) -> None:
    write_tree(tmp_path)
    splits = full(tmp_path).load()
    assert splits.classes == tuple(NAMES)
    assert full(tmp_path).digest() == ""
    assert isinstance(splits.train.images, Files)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 6)
    for part in (splits.train, splits.validation, splits.test):
        levels = torch.cat(list(part.blocks(64)))[:, 0, 4, 4]
        assert torch.equal(levels.long(), 10 * part.labels)
    some = full(tmp_path, classes=[2, 0], limit=12, imbalance=3, in_memory=True).load()
    assert some.train.images.shape == (5, 3, 8, 8)
    assert some.train.labels.bincount().tolist() == [4, 1]  # of 12 images 3 are set apart, of 4 and 5 a third is 1
    assert some.classes == (NAMES[2], NAMES[0])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (f"train/{NAMES[1]}/{NAMES[1]}_3.JPEG", "train: 23 images instead of 24"),
        (f"train/{NAMES[1]}", "2 class folders instead of 3"),
        (f"val/{NAMES[1]}", f"val: 1 class folders are missing, such as .*{NAMES[1]}"),
        (".", r"give dataset\.root=<the folder of train/<WordNet id>"),
    ],
)
def test_imagenet_says_what_is_missing(tmp_path: Path, missing: str, message: str) -> None:
    write_tree(tmp_path / "tree")
    path = tmp_path / "tree" / missing
    if path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)
    with pytest.raises(UserError, match=message):
        full(tmp_path / "tree").load()


def test_imagenet100_takes_its_classes_from_the_tree(tmp_path: Path) -> None:
    write_tree(tmp_path, [*IDS.split(), "n00000001"], train=2, val=1)
    train, test, names, *_ = full(tmp_path, ImageNet100).read()
    assert names == sorted(IDS.split())
    assert test is not None
    assert (len(train), len(test)) == (200, 100)
    shutil.rmtree(tmp_path / "train" / "n02869837")
    with pytest.raises(UserError, match="n02869837"):
        full(tmp_path, ImageNet100).load()


def write_lists(root: Path) -> None:
    write_tree(root, val=2)
    counts = {"train": [8, 4, 2], "val": [1, 1, 1], "test": [2, 2, 2]}
    for part, numbers in counts.items():
        folder = "val" if part == "test" else "train"
        files = [sorted((root / folder / name).iterdir())[-n:] for name, n in zip(NAMES, numbers, strict=True)]
        lines = [f"{path.relative_to(root)} {label}" for label, paths in enumerate(files) for path in paths]
        (root / f"ImageNet_LT_{part}.txt").write_text("\n".join(lines) + "\n")


def long_tailed(root: Path, **changes: object) -> ImageNetLT:
    return ImageNetLT(**{**OPEN, "root": str(root), "validation": None, "in_memory": False, **changes})


def test_imagenet_lt_reads_the_published_lists(tmp_path: Path) -> None:
    write_lists(tmp_path)
    splits = long_tailed(tmp_path).load()
    assert splits.train.labels.bincount().tolist() == [8, 4, 2]
    assert splits.validation.labels.bincount().tolist() == [1, 1, 1]
    assert splits.test.labels.bincount().tolist() == [2, 2, 2]
    assert splits.classes == tuple(NAMES)
    assert not splits.refit
    for part in (splits.train, splits.validation, splits.test):
        assert torch.equal(torch.cat(list(part.blocks(64)))[:, 0, 4, 4].long(), 10 * part.labels)
    some = long_tailed(tmp_path, classes=[1, 0], limit=6).load()
    assert some.train.labels.bincount().tolist() == [2, 4]
    assert some.validation.labels.tolist() == [1, 0]


def test_imagenet_lt_says_what_is_wrong(tmp_path: Path) -> None:
    write_lists(tmp_path)
    with pytest.raises(ValueError, match=r"validation=0\.1: the validation split is published"):
        long_tailed(tmp_path, validation=0.1)
    path = tmp_path / "ImageNet_LT_train.txt"
    lines = path.read_text().splitlines()
    put = r"put ImageNet_LT_\{train,val,test\}\.txt .* beside train/ and val/"
    for content, message in (
        (lines[:-1], rf"ImageNet_LT_train\.txt: 13 lines instead of 14; {put}"),
        ([*lines[:-1], lines[-1].rsplit(" ", 1)[0]], rf"ImageNet_LT_train\.txt: .*{put}"),
        ([*lines[:-2], *(line[:-1] + "1" for line in lines[-2:])], "2 labels instead of 0 to 2"),
        ([*lines[:-1], lines[-1][:-1] + "0"], "has the label of another class"),
        ([*lines[:-1], "0.JPEG 2"], f"0.JPEG is not <folder>/<WordNet id>/<file>; {put}"),
        ([*lines[:-1], f"../{NAMES[2]}/0.JPEG 2"], f"/0.JPEG'] lies outside its folder; {put}".replace("]", r"\]")),
        ([*lines[:-1], f"train/{NAMES[2]}/.. 2"], "lies outside its folder"),
        ([*lines[:-1], "/etc/passwd 2"], "lies outside its folder"),
    ):
        path.write_text("\n".join(content))
        with pytest.raises(UserError, match=message):
            long_tailed(tmp_path).load()
    path.unlink()
    with pytest.raises(UserError, match=put):
        long_tailed(tmp_path).load()
    write_lists(tmp_path)
    shutil.rmtree(tmp_path / "train" / NAMES[2])
    with pytest.raises(UserError, match=f"no folder.*{NAMES[2]}"):
        long_tailed(tmp_path).load()


def write_tiny(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    for c, name in enumerate(NAMES):
        for i in range(8):
            write_image(folder / "train" / name / "images" / f"{name}_{i}.JPEG", level=10 * c)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("n_0.JPEG\t0\t0\t9\t9\n")
    rows = []
    for i in range(6):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", level=10 * (i % 3))
        rows.append(f"val_{i}.JPEG\t{NAMES[i % 3]}\t0\t32\t44\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (folder / "wnids.txt").write_text("\n".join(reversed(NAMES)) + "\n")
    words = [f"{name}\tword {c}, synonym" for c, name in enumerate(NAMES)]
    (folder / "words.txt").write_text("\n".join([*words, "n99999999\tother"]) + "\n")
    return folder


def tiny(root: Path) -> TinyImageNet:
    return TinyImageNet(**OPEN, root=str(root))


def test_tiny_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path)
    splits = tiny(tmp_path).load()
    assert splits.classes == ("word 0", "word 1", "word 2")
    assert capsys.readouterr().err == "", "nothing is said of the published lists of boxes"
    assert splits.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for part in (splits.train, splits.test):
        assert isinstance(part.images, torch.Tensor)
        assert torch.equal(part.images[:, 0, 4, 4].long(), 10 * part.labels)
    notes = folder / "val" / "val_annotations.txt"
    kept = notes.read_text()
    for text, message in (
        ("\n".join(kept.splitlines()[1:]), r"val_annotations\.txt: 5 lines instead of 6; delete"),
        (kept.replace(NAMES[0], "n12345678"), "tiny-imagenet-200: .*delete .* to download it again"),
        (kept.replace("\t", " "), "tiny-imagenet-200: .*delete .* to download it again"),
        (kept.replace("val_0", "../val_0"), r"val_annotations\.txt: .* lies outside its folder; delete"),
    ):
        notes.write_text(text)
        with pytest.raises(UserError, match=message):
            tiny(tmp_path).load()
    notes.write_text(kept)
    (folder / "train" / NAMES[0] / "images" / f"{NAMES[0]}_0.JPEG").unlink()
    with pytest.raises(UserError, match="23 images instead of 24"):
        tiny(tmp_path).load()


def test_tiny_imagenet_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.datasets.tiny_imagenet.URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    with pytest.raises(UserError, match="the folder that holds tiny-imagenet-200>, or a network"):
        tiny(tmp_path / "new").load()
    assert list(tmp_path.iterdir()) == []

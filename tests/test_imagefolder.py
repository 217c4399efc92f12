"""Folders of images: which files are taken, how they are split, and what identifies them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from image_files import all_images, image_folder, write_image, write_photographs
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from scclr.config.errors import UserError
from scclr.datasets import Splits
from scclr.datasets.imagefolder import default_workers, memory_limit
from scclr.run.machine import AT_ONCE
from scclr.run.torchrun import Group


def names(root: Path) -> list[str]:
    return [os.fsdecode(name) for name in all_images(root).images.names]


# Which files are taken ------------------------------------------------------------------------------------------------


def test_the_order_is_torchvisions(tmp_path: Path) -> None:
    for name in ("b/1.png", "b/0.jpg", "b-c/x/2.JPEG", "b.d/0.png", "b/x/y/0.png", "b/x-y/0.png", "B/0.webp"):
        for label in ("cat", "cat-2", "Dog"):
            write_image(tmp_path / label / name)
    expected = make_dataset(str(tmp_path), {"Dog": 0, "cat": 1, "cat-2": 2}, IMG_EXTENSIONS)
    data = all_images(tmp_path)
    assert names(tmp_path) == [os.path.relpath(path, tmp_path) for path, _ in expected]
    assert data.labels.tolist() == [label for _, label in expected]


def test_no_folder_is_read_twice(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in ("tree/cat/0", "tree/dog/0", "tree/dog/puppies/0", "store/0", "store/more/0"):
        write_image(tmp_path / f"{name}.png")
    for link, target in (
        ("cat/loop", "."), ("cat/root", ".."), ("cat/dogs", "../dog"), ("cat/puppies", "../dog/puppies"),
        ("cat/self", "self"), ("cat/store", "../../store"), ("dog/store", "../../store"), ("cat/lost.png", "gone.png"),
    ):  # fmt: skip
        (root / link).symlink_to(target)
    (root / "bird").symlink_to("../birds")
    write_image(tmp_path / "birds" / "0.png")
    taken = ["bird/0.png", "cat/0.png", "cat/store/0.png", "cat/store/more/0.png", "dog/0.png", "dog/puppies/0.png"]
    assert names(root) == taken
    (root / "all").symlink_to(".")
    with pytest.raises(UserError, match=r"1 class folders have no images of their own, such as \['all'\]"):
        names(root)


def test_other_files_are_counted_and_a_pipe_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photographs(tmp_path, per_class=2)
    for name in ("china/a.gif", "china/b.GIF", "flower/more/c.gif", "china/d.txt", "flower/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "china" / "pipe.png")
    for _ in range(2):
        assert len(all_images(tmp_path)) == 4
    kinds = r".gif 3, .txt 1, no extension 1, no regular file 1"
    said = capsys.readouterr().err
    assert sorted(said.removesuffix(")\n").split("(")[1].split(", ")) == sorted(kinds.split(", "))
    assert said.startswith(f"{tmp_path}: 6 files of other kinds are left out (")
    assert said.count("\n") == 1


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    advice = "give dataset.root=<a folder with one folder for each class>"
    for change, message in (
        (lambda: None, "tree: no such folder"),
        ((tmp_path / "tree").mkdir, "tree: no class folders"),
        (lambda: write_image(tmp_path / "tree" / "0.png"), "tree: no class folders"),
        ((tmp_path / "tree" / "cat").mkdir, r"1 class folders have no images of their own, such as \['cat'\]"),
    ):
        change()
        for use in (image_folder(tmp_path / "tree").load, image_folder(tmp_path / "tree").digest):
            with pytest.raises(UserError, match=f"{message}.*{advice}"):
                use()


@pytest.mark.parametrize("below", [".", "cat", "cat/more"])
def test_a_folder_that_may_not_be_entered(tmp_path: Path, below: str) -> None:
    write_image(tmp_path / "cat" / "more" / "0.png")
    (tmp_path / below).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may enter any folder
            for folder in (tmp_path, *tmp_path.parents[:-2]):
                folder.chmod(folder.stat().st_mode | 0o755 if folder != tmp_path / below else 0)
            os.seteuid(65534)
        with pytest.raises(UserError, match=r"dataset\.root="):
            image_folder(tmp_path).load()
    finally:
        os.seteuid(user)
        (tmp_path / below).chmod(0o755)


@pytest.mark.parametrize(("processes", "at_once", "expected"), [(1, 1, 12), (4, 1, 3), (100, 1, 1), (2, 3, 2)])
def test_workers_share_the_cores_of_a_node(
    processes: int, at_once: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Group(size=processes, local_size=processes)
    monkeypatch.setattr("scclr.run.machine.group", lambda: node)
    monkeypatch.setattr("scclr.run.machine.available_cores", lambda: 12)
    monkeypatch.setenv(AT_ONCE, str(at_once))
    assert default_workers() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size=0: give a number of pixels from 1"),
        ({"image_size": 5_000_000}, "image_size=5000000"),
        ({"resize": 20}, "give at least image_size=24"),
        ({"resize": 5_000_000}, "at most"),
        ({"on_corrupt": "ignore"}, "refuse or skip"),
        ({"workers": -1}, "workers=-1"),
        ({"root": ""}, r"root is empty: give a folder; dataset\.root=\. is the current one"),
        ({"cache": ""}, "cache is empty"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_folder(**{"root": Path(), **changes})


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_levels(tmp_path, 16)
    monkeypatch.setattr("scclr.datasets.imagefolder.memory_limit", lambda: 16 * 3 * 24 * 24)
    message = r"18 images of 24 x 24 pixels take 0\.0 GiB of .*: type dataset\.in_memory=false or a smaller"
    with pytest.raises(UserError, match=message):
        image_folder(tmp_path, in_memory=True).load()
    image_folder(tmp_path).load()


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_limit()
    assert 2**28 < whole < 2**50
    monkeypatch.setattr(Path, "read_text", lambda self: "max\n")
    assert memory_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(Path, "read_text", lambda self: "1000000\n")
    assert memory_limit() == 1_000_000


# How they are split ---------------------------------------------------------------------------------------------------


def write_levels(folder: Path, per_class: int) -> None:
    """Cats of the grey levels 0 to 99, dogs of 100 and above."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(per_class):
            write_image(folder / name / f"{i}.png", 100 * label + i, size=(30, 20 + i))


def test_a_test_split_is_carved(tmp_path: Path) -> None:
    write_levels(tmp_path, 16)
    splits = image_folder(tmp_path, image_size=16, in_memory=True).load()
    assert splits.train.images.shape == (18, 3, 16, 16)
    assert (len(splits.validation), len(splits.test)) == (6, 8)
    assert splits.classes == ("cat", "dog")
    assert splits.test.labels.bincount().tolist() == [4, 4]
    assert torch.equal(splits.test.images.amax((1, 2, 3)) >= 100, splits.test.labels == 1)


def test_a_test_folder_is_used(tmp_path: Path) -> None:
    write_levels(tmp_path / "train", 8)
    write_levels(tmp_path / "val", 3)
    assert len(image_folder(tmp_path).load().test) == 6
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(UserError, match="class folders"):
        image_folder(tmp_path).load()


ONE = ["train", "dataset=imagefolder", "dataset.root=tree", "dataset.image_size=16", "pretrain.batch_size=4"]
ONE += [word for word in TINY if "limit" not in word and "batch_size" not in word and "knn_every" not in word]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["stages=[pretrain]"],
        ["stages=[pretrain]", "pretrain.knn_every=0", "loss=supcon"],
        ["stages=[pretrain]", "pretrain.knn_every=0", "loss=prototype"],
    ],
)
def test_one_class_is_refused_where_classes_are_told_apart(
    words: list[str], scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The root is often a level too high, and the accuracy would be 100 %."""
    write_levels(folder / "tree" / "photographs", 8)
    assert scclr(*ONE, *words) == 1
    error = capsys.readouterr().err
    assert "one class, 'photographs': dataset.root may be a level too high; give dataset.root=<a folder with" in error
    assert ("pretrain.knn_every=0" in error) == ("pretrain.knn_every=0" not in words)
    assert error.count("\n") == 1
    assert os.listdir(folder) == ["tree"]


def test_images_without_classes_can_be_pretrained_on(scclr: Callable[..., int], folder: Path) -> None:
    write_levels(folder / "tree" / "photographs", 8)
    assert scclr(*ONE, "stages=[pretrain]", "pretrain.knn_every=0") == 0


def test_the_splits_are_checked_before_images_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(splits: Splits) -> None:
        counts.append(len(splits.train))
        if refuse:
            raise UserError("refused")

    write_levels(tmp_path / "tree", 16)
    for path in (tmp_path / "tree").glob("cat/[1-4].png"):
        path.write_bytes(b"not an image")
    for held in ({"in_memory": True}, {"cache": str(tmp_path / "cache")}):
        source = image_folder(tmp_path / "tree", on_corrupt="skip", **held)
        counts: list[int] = []
        refuse = True
        with pytest.raises(UserError, match="refused"):
            source.load(check)
        assert not (tmp_path / "cache").exists()
        assert "corrupt" not in capsys.readouterr().err
        refuse = False
        assert len(source.load(check).train) == counts[-1] < counts[0] == counts[1] == 18, "and again on what is left"
        capsys.readouterr()


def test_a_cache_is_no_class(tmp_path: Path) -> None:
    write_levels(tmp_path / "tree" / "train", 16)
    (tmp_path / "link").symlink_to("tree")
    for below in ("", "squares", "cat/squares"):
        for root, folder in ((tmp_path / "tree" / "train",) * 2, (tmp_path / "tree", tmp_path / "link" / "train")):
            with pytest.raises(UserError, match=r"dataset\.cache=.* would be one of the class folders"):
                image_folder(root, cache=str(folder / below)).digest()
    image_folder(tmp_path / "tree", cache=str(tmp_path / "tree" / "squares")).load()


# What identifies them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "renames",
    [
        {"new.png": "train/cat/new.png"},
        {"longer.png": "test/dog/0.png"},
        {"train/cat/0.png": "train/dog/9.png"},
        {"train/cat/0.png": "train/cat/9.png"},
        {"train/cat": "train/bird", "test/cat": "test/bird"},
        {"test": "kept", "train": "test", "kept": "train"},
    ],
)
def test_another_folder_has_another_digest(renames: dict[str, str], tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "a" / part / name / f"{i}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = image_folder(tmp_path / "a").digest()
    assert image_folder(tmp_path / "b", image_size=32, cache="x", workers=1).digest() == first
    assert len(first) == 16
    write_image(tmp_path / "b" / "new.png")
    write_image(tmp_path / "b" / "longer.png", size=(99, 99))
    for old, new in renames.items():
        (tmp_path / "b" / old).rename(tmp_path / "b" / new)
    assert image_folder(tmp_path / "b").digest() != first


# Without labels -------------------------------------------------------------------------------------------------------


def flat_folder(root: Path, images: int = 20) -> Path:
    """Images of different grey levels, some of them in a folder below."""
    for i in range(images):
        write_image(root / ("more" if i % 4 == 0 else ".") / f"{i:03}.png", level=i * 10)
    (root / "notes.txt").touch()
    return root


def test_a_flat_folder_has_no_classes_and_no_test_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    splits = image_folder(flat_folder(tmp_path), labels=None, in_memory=True).load()
    assert splits.classes == ()
    assert splits.pretrain is splits.train
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (15, 5, 0)
    assert set(splits.train.labels.tolist()) == set(splits.validation.labels.tolist()) == {-1}
    levels = [part.images.flatten(1)[:, 0].tolist() for part in (splits.train, splits.validation)]
    assert sorted([*levels[0], *levels[1]]) == [i * 10 for i in range(20)]
    assert "1 files of other kinds are left out (.txt 1)" in capsys.readouterr().err


def test_the_splits_of_a_flat_folder_are_seeded_and_limited(tmp_path: Path) -> None:
    root = flat_folder(tmp_path)
    first, same, other = (image_folder(root, labels=None, split_seed=seed).load() for seed in (0, 0, 1))
    assert torch.equal(first.train.images.index, same.train.images.index)
    assert not torch.equal(first.validation.images.index, other.validation.images.index)
    few = image_folder(root, labels=None, limit=8).load()
    assert (len(few.train), len(few.validation)) == (6, 2)
    everything = image_folder(root, labels=None, validation=None).load()
    assert (len(everything.train), len(everything.validation)) == (20, 0)


def test_labels_are_a_part_of_what_a_folder_is(tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=3)
    assert image_folder(tmp_path).digest() != image_folder(tmp_path, labels=None).digest()
    write_image(tmp_path / "new.png")
    assert len(image_folder(tmp_path).read().train) == 6
    assert len(image_folder(tmp_path, labels=None).read().train) == 7


def test_broken_files_of_a_flat_folder_are_refused_or_skipped(tmp_path: Path) -> None:
    (flat_folder(tmp_path) / "005.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"005\.png"):
        image_folder(tmp_path, labels=None, in_memory=True).load()
    splits = image_folder(tmp_path, labels=None, in_memory=True, on_corrupt="skip").load()
    assert len(splits.train) + len(splits.validation) == 19
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="no readable training image is left"):
        image_folder(tmp_path, labels=None, in_memory=True, on_corrupt="skip").load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [0, 1]}, r"dataset\.classes=\[0, 1\] needs labels, and these images have none: drop it"),
        ({"imbalance": 10}, r"dataset\.imbalance=10 needs labels"),
        ({"limit": 1, "validation": 0.9}, r"dataset\.validation=0\.9 leaves none of 1 images to train on"),
    ],
)
def test_what_needs_labels_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        image_folder(flat_folder(tmp_path), labels=None, **changes).load()


def test_a_flat_folder_is_pretrained_on_and_nothing_else(
    scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in flat_folder(folder / "flat", 40).glob("more/*"):
        path.rename(folder / "flat" / path.name)
    (folder / "flat" / "more").rmdir()
    words = ["dataset=imagefolder", "dataset.root=flat", "dataset.image_size=8", "augment=crop", *TINY[1:]]
    assert scclr("train", *words) == 1
    assert "images without labels: dataset.labels=null" in capsys.readouterr().err
    words += ["dataset.labels=null", "pretrain.batch_size=16"]
    for more in ([], ["stages=[pretrain]"], ["stages=[pretrain,theory]", "pretrain.knn_every=0"]):
        assert scclr("train", *words, *more) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "these images have no labels; give labelled ones" in line
        assert ("or type stages=[pretrain] pretrain.knn_every=0" in line) == ("pretrain.knn_every=0" not in more)
    only = ["stages=[pretrain]", "pretrain.knn_every=0"]
    assert scclr("train", *words, *only, "loss=supcon") == 1
    assert "these images have no labels" in capsys.readouterr().err
    assert not (folder / "runs").exists()
    assert scclr("train", *words, *only) == 0
    (run,) = (folder / "runs").glob("*/*/")
    assert scclr("train", "stages=[probe]", f"init_from={run}", "dataset.limit=300", *TINY[-2:]) == 0

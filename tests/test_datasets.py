"""Every dataset, read from small files in its true on-disk format, written here; and what a broken file says."""

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from scclr.config import UserError
from scclr.datasets import Source, with_channels
from scclr.datasets.cifar10 import CIFAR10
from scclr.datasets.cifar100 import CIFAR100
from scclr.datasets.digits import Digits
from scclr.datasets.fashion_mnist import FashionMNIST
from scclr.datasets.imagefolder import ImageFolder
from scclr.datasets.mnist import MNIST
from scclr.datasets.stl10 import STL10
from scclr.datasets.svhn import SVHN

GREY = {"mean": [0.3], "std": [0.4]}
COLOUR = {"mean": [0.5] * 3, "std": [0.2] * 3}
COMMON = {"limit": None, "classes": None, "validation": 0.25, "split_seed": 0}
random = np.random.default_rng(0)


def digits(**changes: object) -> Digits:
    return Digits(**{**COMMON, **GREY, "test": 0.25, **changes})  # type: ignore[arg-type]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- splitting


def test_splits_are_disjoint_stratified_and_seeded() -> None:
    splits, same, other = digits().load(), digits().load(), digits(split_seed=1).load()
    sizes = [len(part) for part in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == 1797
    assert splits.pretrain is splits.train
    # images are distinguishable, so disjointness shows in their bytes
    keys = [
        {image.numpy().tobytes() for image in part.images} for part in (splits.train, splits.validation, splits.test)
    ]
    assert sum(map(len, keys)) == len(set.union(*keys))
    for part in (splits.train, splits.validation, splits.test):
        share = torch.bincount(part.labels).double() / len(part)
        assert (share - 0.1).abs().max() < 0.01
    assert torch.equal(splits.test.images, same.test.images)
    assert not torch.equal(splits.test.images[:100], other.test.images[:100])


def test_digits_are_scikit_learns() -> None:
    splits = digits().load()
    assert splits.train.images.dtype == torch.uint8
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert int(splits.train.images.max()) == 255
    assert splits.classes == tuple("0123456789")


def test_limit_is_stratified_and_leaves_the_test_split() -> None:
    splits = digits(limit=200).load()
    assert len(splits.train) + len(splits.validation) == 200
    assert torch.bincount(splits.train.labels).min() >= 13
    assert len(splits.test) == len(digits().load().test)


def test_classes_are_renumbered_in_the_given_order() -> None:
    some, full = digits(classes=[7, 2]).load(), digits().load()
    assert some.classes == ("7", "2")
    assert set(some.train.labels.tolist()) == {0, 1}
    sevens = {
        image.numpy().tobytes()
        for part in (full.train, full.validation, full.test)
        for image in part.images[part.labels == 7]
    }
    assert all(image.numpy().tobytes() in sevens for image in some.test.images[some.test.labels == 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"classes": [1]}, "two or more"),
        ({"classes": [1, 1]}, "different labels"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"std": [0.0]}, "std positive"),
        ({"imbalance": 0.5}, "imbalance=0.5"),
        ({"imbalance_profile": "linear"}, "exponential or step"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 12}, "too few"),
        ({"classes": [3, 10]}, "labels run from 0 to 9"),
        ({"test": None}, "no test split"),
        ({"validation": None}, "no validation split"),
        ({"imbalance": 200}, "leaves no image of class 9: give at most 9"),
    ],
)
def test_impossible_subsets(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        digits(**changes).load()


def test_channels_follow_the_encoder() -> None:
    grey = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
    colour = with_channels(grey, 3)
    assert colour.shape == (1, 3, 2, 2)
    assert torch.equal(with_channels(colour, 1), grey)


# ---------------------------------------------------------------- MNIST, Fashion-MNIST: idx files


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_fashion(folder: Path, suffix: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = random.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for part, n in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[:n])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8) % 10)
    return images


def fashion(root: Path | None) -> FashionMNIST:
    return FashionMNIST(**COMMON, **GREY, root=str(root) if root else None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("below", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", ".gz"), ("FashionMNIST/raw", "")]
)
def test_fashion_mnist(tmp_path: Path, below: str, suffix: str) -> None:
    images = write_fashion(tmp_path / below, suffix)
    splits = fashion(tmp_path).load()
    assert torch.equal(splits.test.images, torch.from_numpy(images[:20]).unsqueeze(1))
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.classes[9] == "Ankle boot"


def test_mnist(tmp_path: Path) -> None:
    images = write_fashion(tmp_path / "MNIST" / "raw", ".gz")
    splits = MNIST(**COMMON, **GREY, root=str(tmp_path)).load()  # type: ignore[arg-type]
    assert torch.equal(splits.test.images, torch.from_numpy(images[:20]).unsqueeze(1))
    assert splits.classes[3] == "3 - three"
    truncate(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.*dataset\.root"):
        MNIST(**COMMON, **GREY, root=str(tmp_path)).load()  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("suffix", "damage"), [(".gz", truncate), (".gz", flip), ("", truncate), (".gz", Path.unlink)])
def test_fashion_mnist_names_the_broken_file(tmp_path: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    write_fashion(tmp_path, suffix)
    damage(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    with pytest.raises(
        UserError, match=r"t10k-images-idx3-ubyte.*apt-get install dataset-fashion-mnist.*dataset\.root"
    ):
        fashion(tmp_path).load()


def test_fashion_mnist_counts_labels(tmp_path: Path) -> None:
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="40 images but 7 labels"):
        fashion(tmp_path).load()


# ---------------------------------------------------------------- CIFAR: pickled batches


def write_cifar(root: Path, source: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A small CIFAR with checksums of its own; returns the training pixels [N, 3, 32, 32]."""
    reader = source.reader
    folder, classes = root / reader.base_folder, 100 if source is CIFAR100 else 10
    folder.mkdir(parents=True)
    pixels = random.integers(0, 256, (5, 8 * classes // 10 * (10 if classes == 10 else 5), 3072), dtype=np.uint8)
    label_key = "fine_labels" if classes == 100 else "labels"

    def write(name: str, content: dict) -> tuple[str, str]:
        with open(folder / name, "wb") as file:
            pickle.dump(content, file)
        return name, md5(folder / name)

    def batch(i: int) -> dict:
        return {"data": pixels[i], label_key: [k % classes for k in range(len(pixels[i]))]}

    train = [write(name, batch(i)) for i, (name, _) in enumerate(reader.train_list)]
    test = [write(name, batch(0)) for name, _ in reader.test_list]
    names = [f"class {i}" for i in range(classes)]
    name, digest = write(reader.meta["filename"], {reader.meta["key"]: names})
    monkeypatch.setattr(reader, "train_list", [list(entry) for entry in train])
    monkeypatch.setattr(reader, "test_list", [list(entry) for entry in test])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "filename": name, "md5": digest})
    return pixels[: len(train)].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_cifar(source: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path, source, monkeypatch)
    dataset = source(**COMMON, **COLOUR, root=str(tmp_path))  # type: ignore[arg-type]
    train, test, names, unlabelled, validation = dataset.read()
    assert torch.equal(train.images, torch.from_numpy(pixels))
    assert train.labels[:3].tolist() == [0, 1, 2]
    assert test is not None
    assert torch.equal(test.images, train.images[: len(test)])
    assert names[1] == "class 1"
    assert unlabelled is validation is None
    assert len(dataset.load().validation) == len(train) // 4


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_cifar_names_the_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    damage(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(UserError, match=r"data_batch_3: .*delete .*cifar-10-batches-py to download it again"):
        CIFAR10(**COMMON, **COLOUR, root=str(tmp_path)).load()  # type: ignore[arg-type]


@pytest.mark.parametrize(("source", "base"), [(CIFAR10, "cifar-10-batches-py"), (STL10, "stl10_binary")])
def test_a_failed_download_leaves_nothing(
    source: type[CIFAR10], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reader in ("CIFAR10", "STL10"):
        monkeypatch.setattr(f"torchvision.datasets.{reader}.url", "http://127.0.0.1:9/nothing.tar.gz")
    with pytest.raises(UserError, match=rf"dataset\.root=<the folder that holds {base}>, or a network"):
        source(**COMMON, **COLOUR, root=str(tmp_path / "new")).load()  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- STL-10: raw binary


def write_stl(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    from torchvision.datasets import STL10 as Reader

    folder = root / "stl10_binary"
    folder.mkdir()
    pixels = random.integers(0, 256, (40, 3, 96, 96), dtype=np.uint8)
    pixels.transpose(0, 1, 3, 2).tofile(folder / "train_X.bin")  # column-major
    pixels[:20].transpose(0, 1, 3, 2).tofile(folder / "test_X.bin")
    pixels[:30].transpose(0, 1, 3, 2).tofile(folder / "unlabeled_X.bin")
    (np.arange(40, dtype=np.uint8) % 10 + 1).tofile(folder / "train_y.bin")  # labels from 1
    (np.arange(20, dtype=np.uint8) % 10 + 1).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    (folder / "fold_indices.txt").write_text("0 1 2\n")
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(Reader, name, [[file, md5(folder / file)] for file, _ in getattr(Reader, name)])
    return pixels


def test_stl10_pretrains_on_the_unlabelled_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_stl(tmp_path, monkeypatch)
    splits = STL10(**COMMON, **COLOUR, root=str(tmp_path)).load()  # type: ignore[arg-type]
    assert torch.equal(splits.pretrain.images, torch.from_numpy(pixels[:30]))
    assert set(splits.pretrain.labels.tolist()) == {-1}
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert len(STL10(**{**COMMON, "limit": 20, "validation": 0.5}, **COLOUR, root=str(tmp_path)).load().pretrain) == 20  # type: ignore[arg-type]


def test_stl10_names_the_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl(tmp_path, monkeypatch)
    truncate(tmp_path / "stl10_binary" / "unlabeled_X.bin")
    with pytest.raises(UserError, match=r"unlabeled_X\.bin: truncated or corrupt"):
        STL10(**COMMON, **COLOUR, root=str(tmp_path)).load()  # type: ignore[arg-type]


# ---------------------------------------------------------------- SVHN: MATLAB files


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, labels: int = 40) -> np.ndarray:
    """Pixels [N, 32, 32, 3]; the digit 0 is labelled 10."""
    pixels = random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    listed = {}
    for part, n in (("train", 40), ("test", 20)):
        digits = (np.arange(min(n, labels), dtype=np.uint8) % 10 + 1).reshape(-1, 1)
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": pixels[:n].transpose(1, 2, 3, 0), "y": digits})
        listed[part] = ["http://127.0.0.1:9/", path.name, md5(path)]
    monkeypatch.setattr("torchvision.datasets.SVHN.split_list", listed)
    return pixels


def svhn(root: Path) -> SVHN:
    return SVHN(**COMMON, **COLOUR, root=str(root))  # type: ignore[arg-type]


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_svhn(tmp_path, monkeypatch)
    splits = svhn(tmp_path).load()
    assert torch.equal(splits.test.images, torch.from_numpy(pixels[:20]).permute(0, 3, 1, 2))
    assert splits.test.images.is_contiguous()
    assert splits.test.labels.tolist() == [(i + 1) % 10 for i in range(20)]
    truncate(tmp_path / "test_32x32.mat")
    with pytest.raises(UserError, match=r"test_32x32\.mat: truncated or corrupt .*delete it"):
        svhn(tmp_path).load()


def test_svhn_counts_labels_and_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch, labels=30)
    with pytest.raises(UserError, match=r"train_32x32\.mat: 40 images but 30 labels"):
        svhn(tmp_path).load()
    with pytest.raises(UserError, match=r"the folder that holds train_32x32\.mat>, or a network"):
        svhn(tmp_path / "new").load()
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- a folder of images


def write_tree(folder: Path, per_class: int) -> None:
    for k, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(np.full((20 + i, 30, 3), 100 * k + i, np.uint8)).save(folder / name / f"{i}.png")


def tree(root: Path, **changes: object) -> ImageFolder:
    settings = {**COMMON, **COLOUR, "test": 0.25, "image_size": 16, "root": str(root), **changes}
    return ImageFolder(**settings)  # type: ignore[arg-type]


def test_imagefolder_carves_a_test_split(tmp_path: Path) -> None:
    write_tree(tmp_path, 16)
    splits = tree(tmp_path).load()
    assert splits.train.images.shape == (18, 3, 16, 16)
    assert (len(splits.validation), len(splits.test)) == (6, 8)
    assert splits.classes == ("cat", "dog")
    assert set((splits.test.images.amax((1, 2, 3)) >= 100).tolist()) == {False, True}
    assert torch.equal(splits.test.images.amax((1, 2, 3)) >= 100, splits.test.labels == 1)


def test_imagefolder_uses_a_test_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", 8)
    write_tree(tmp_path / "val", 3)
    assert len(tree(tmp_path).load().test) == 6
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "cow")
    with pytest.raises(UserError, match="class folders"):
        tree(tmp_path).load()


def test_imagefolder_names_the_broken_file(tmp_path: Path) -> None:
    write_tree(tmp_path, 8)
    (tmp_path / "dog" / "3.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"dog/3\.png: .*replace or delete this file"):
        tree(tmp_path).load()
    with pytest.raises(ValueError, match="image_size=0"):
        tree(tmp_path, image_size=0)


def test_source_is_the_only_way_to_read() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Source(**COMMON, **GREY)  # type: ignore[abstract, arg-type]

"""Every published dataset, read from small files in its true format; how sets are split; what a broken file says."""

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import COLOUR, GREY, digits, image_bytes, md5, truncate, write_cifar
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision.datasets import STL10 as STL10Reader

from scclr.config.errors import UserError
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.cifar10 import CIFAR10
from scclr.datasets.cifar100 import CIFAR100
from scclr.datasets.digit_texture import DIRECTIONS, TEXTURES, WAVELENGTHS, DigitTexture, gratings
from scclr.datasets.digits import Digits
from scclr.datasets.fashion_mnist import FashionMNIST
from scclr.datasets.mnist import MNIST
from scclr.datasets.stl10 import STL10
from scclr.datasets.svhn import SVHN

random = np.random.default_rng(0)


# Splitting ------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_stratified_and_seeded() -> None:
    splits, same, other = digits().load(), digits().load(), digits(split_seed=1).load()
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 1797
    expected = [np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images]
    assert set.union(*map(image_bytes, parts)) == set(expected)
    assert splits.pretrain is splits.train
    assert splits.train.images.shape[-1] == Digits.image_size
    for part in parts:
        share = torch.bincount(part.labels).double() / len(part)
        assert (share - 0.1).abs().max() < 0.01
    assert torch.equal(splits.test.images, same.test.images)
    assert image_bytes(splits.test) != image_bytes(other.test)


def test_limit_is_stratified_and_leaves_the_test_split() -> None:
    splits = digits(limit=200).load()
    assert len(splits.train) + len(splits.validation) == 200
    assert torch.bincount(splits.train.labels).min() >= 13
    assert len(splits.test) == len(digits().load().test)


def test_classes_are_renumbered_in_the_given_order() -> None:
    some, full = digits(classes=[7, 2]).load(), digits().load()
    assert some.classes == ("7", "2")
    assert set(some.train.labels.tolist()) == {0, 1}
    sevens = [image_bytes(part[part.labels == 7]) for part in (full.train, full.validation, full.test)]
    assert image_bytes(some.test[some.test.labels == 0]) <= set.union(*sevens)


def test_every_pixel_is_held_once() -> None:
    splits = digits().load()
    parts = (splits.pretrain, splits.train, splits.validation, splits.test)
    storages = [part.images.untyped_storage() for part in parts]
    assert sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) == 1797 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"classes": [1]}, "two or more"),
        ({"classes": [1, 1]}, "different labels"),
        ({"validation": 1.0}, "validation=1.0: give a share between 0 and 1"),
        ({"test": float("nan")}, "test=nan: give a share between 0 and 1"),
        ({"split_seed": -1}, "split_seed=-1: give a number from 0"),
        ({"std": [0.0]}, "std from 0.0001 to 1"),
        ({"std": [float("nan")]}, "std from 0.0001 to 1"),
        ({"std": [1e-5]}, "std from 0.0001 to 1"),
        ({"mean": [float("inf")]}, "mean from 0 to 1"),
        ({"mean": [0.3, 0.3]}, "one of each per channel"),
        ({"imbalance": 0.5}, "imbalance=0.5"),
        ({"imbalance": float("nan")}, "imbalance=nan"),
        ({"imbalance": float("inf")}, "imbalance=inf"),
        ({"imbalance_profile": "linear"}, "exponential or step"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 9}, r"dataset\.limit=9 cannot split these 1347 images: each part takes .* each of the 10 classes"),
        (
            {"limit": 12},
            r"dataset\.validation=0\.25 .* 12 images: 8 classes have one image only.*dataset\.limit",
        ),
        ({"test": 1e-9}, r"dataset\.test=1e-09 cannot split these 1797 images: each part takes .* give another number"),
        ({"validation": 0.9999}, r"dataset\.validation=0\.9999 cannot split"),
        ({"classes": [3, 10]}, "labels run from 0 to 9"),
        ({"test": None}, "no test split"),
        ({"validation": None}, "no validation split"),
        ({"imbalance": 200}, "leaves no image of class 9: give at most 9"),
        ({"mean": [0.3] * 3, "std": [0.4] * 3}, r"dataset\.mean=.*the images have 1 channels"),
    ],
)
def test_impossible_subsets(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        digits(**changes).load()


class Noise(Source):
    """A dataset that somebody adds without a digest of its own."""

    root: str = "data"
    names = ("only",)

    def read(self) -> Parts:
        return Parts(ImageSet(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8).long()), None, self.names)


def test_one_class_can_be_split_but_not_thinned() -> None:
    splits = Noise(**GREY, test=0.5).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3, 1, 4)
    with pytest.raises(UserError, match=r"dataset\.imbalance=10 needs two classes or more"):
        Noise(**GREY, test=0.5, imbalance=10).load()


def test_a_class_of_one_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2])
    parts = Parts(ImageSet(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), labels), None, ["cat", "cow", "dog", "no image"])
    monkeypatch.setattr(Noise, "read", lambda self: parts)
    with pytest.raises(UserError, match=r"1 classes have one image only, such as \['cow'\]; .*leave these classes out"):
        Noise(**GREY, test=0.5).load()


def test_the_digest_of_other_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published data is known by its name; other data by its folder, unless the dataset can tell more."""
    published = [digits(), MNIST(**GREY, root="nowhere"), CIFAR100(**COLOUR, root="nowhere")]
    assert [source.digest() for source in published] == ["", "", ""]
    source = Noise(**GREY)
    first = source.digest()
    assert len(first) == 16
    monkeypatch.chdir(tmp_path)
    assert source.digest() != first
    monkeypatch.setattr(Noise, "root", None)
    assert source.digest() == ""


# Digits on textures ---------------------------------------------------------------------------------------------------


def textured(**changes: object) -> DigitTexture:
    return DigitTexture(**{**GREY, "test": 0.25, **changes})


def test_both_features_are_labels_of_the_same_images() -> None:
    digit, texture, other = textured().load(), textured(label="texture").load(), textured(split_seed=1).load()
    assert digit.classes == tuple("0123456789")
    assert texture.classes == tuple(TEXTURES)
    assert torch.equal(digit.test.images, texture.test.images), "no image of a test split is pretrained on"
    assert torch.equal(digit.test.images, textured().load().test.images)
    assert image_bytes(digit.test).isdisjoint(image_bytes(other.test))
    parts = [(part.train, part.validation, part.test) for part in (digit, texture)]
    assert len(set.union(*map(image_bytes, parts[0]))) == 1797
    assert set.union(*map(image_bytes, parts[0])) == set.union(*map(image_bytes, parts[1]))
    pairs = torch.zeros(10, 10, dtype=torch.int64)
    pairs.index_put_((digit.test.labels, texture.test.labels), torch.tensor(1), accumulate=True)
    assert pairs.sum() == len(digit.test)
    assert 3 <= pairs.min() <= pairs.max() <= 6, "the features are independent"
    assert digit.train.images.shape[1:] == (1, DigitTexture.image_size, DigitTexture.image_size)


def test_ink_covers_the_texture() -> None:
    read = [textured(label=label).read() for label in ("digit", "texture")]
    images, digits_, textures = read[0].train.images, read[0].train.labels, read[1].train.labels
    assert isinstance(images, torch.Tensor)
    for digit in (0, 1):
        middle = images[digits_ == digit].float().mean(0)[0, 6:10, 6:10].mean()
        assert middle > 200 if digit == 1 else middle < 130
    corners = images[:, 0, :, :2].float()  # hardly any digit reaches the edge
    assert corners.max() > 100 > 10 > corners.min()
    assert len(textures.unique()) == 10


@pytest.mark.parametrize("texture", range(10))
def test_a_texture_is_a_wave_of_its_direction_and_length(texture: int) -> None:
    phases = torch.linspace(0, 6, 5)
    waves = gratings(torch.full((5,), texture), phases, 96)
    assert (waves.min(), waves.max()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    power = np.abs(np.fft.rfft2(waves[:, 0].numpy() - 0.5)) ** 2  # [5, 96, 49]
    y, x = np.unravel_index(power.mean(0).argmax(), power.shape[1:])
    y = y - 96 if y > 48 else y
    frequency = np.hypot(x, y) / 96
    assert frequency == pytest.approx(1 / WAVELENGTHS[texture // DIRECTIONS], abs=0.01)
    angle = np.degrees(np.arctan2(y, x)) % 180
    off = abs(angle - 180 / DIRECTIONS * (texture % DIRECTIONS))
    assert min(off, 180 - off) < 4
    assert not torch.allclose(waves[0], waves[1], atol=0.2), "the phase is random"


def test_the_label_of_a_texture_is_chosen() -> None:
    with pytest.raises(ValueError, match="label=colour: choose digit or texture"):
        textured(label="colour")


# MNIST, Fashion-MNIST: idx files --------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(folder: Path, suffix: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = random.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    for part, n in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[:n])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8) % 10)
    return images


@pytest.mark.parametrize(
    ("source", "below", "suffix", "last_class"),
    [
        (FashionMNIST, "", ".gz", "Ankle boot"),
        (FashionMNIST, "FashionMNIST/raw", "", "Ankle boot"),
        (MNIST, "", "", "9 - nine"),
        (MNIST, "MNIST/raw", ".gz", "9 - nine"),
    ],
)
def test_mnist(source: type[MNIST], below: str, suffix: str, last_class: str, tmp_path: Path) -> None:
    images = write_mnist(tmp_path / below, suffix)
    splits = source(**GREY, root=str(tmp_path)).load()
    assert torch.equal(splits.test.images, torch.from_numpy(images[:20]).unsqueeze(1))
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.classes[9] == last_class
    assert splits.train.images.shape[-1] == source.image_size


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("source", [FashionMNIST, MNIST])
@pytest.mark.parametrize(("suffix", "damage"), [(".gz", truncate), (".gz", flip), ("", truncate), (".gz", Path.unlink)])
def test_mnist_names_the_broken_file(
    source: type[MNIST], suffix: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    write_mnist(tmp_path, suffix)
    damage(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    with pytest.raises(UserError, match=f"t10k-images-idx3-ubyte.*{re.escape(source.advice)}"):
        source(**GREY, root=str(tmp_path)).load()


def test_mnist_counts_labels(tmp_path: Path) -> None:
    write_mnist(tmp_path, "")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="40 images but 7 labels"):
        MNIST(**GREY, root=str(tmp_path)).load()


# CIFAR: pickled batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_cifar(source: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar(tmp_path, source, monkeypatch)
    dataset = source(**COLOUR, root=str(tmp_path))
    train, test, names, unlabelled, validation = dataset.read()
    assert test is not None
    assert torch.equal(train.images, torch.from_numpy(pixels))
    assert train.images.shape[-1] == source.image_size
    assert train.labels[:3].tolist() == [0, 1, 2]
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
        CIFAR10(**COLOUR, root=str(tmp_path)).load()


@pytest.mark.parametrize(("source", "base"), [(CIFAR10, "cifar-10-batches-py"), (STL10, "stl10_binary")])
def test_a_failed_download_leaves_nothing(
    source: type[CIFAR10], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reader in ("CIFAR10", "STL10"):
        monkeypatch.setattr(f"torchvision.datasets.{reader}.url", "http://127.0.0.1:9/nothing.tar.gz")
    with pytest.raises(UserError, match=rf"dataset\.root=<the folder that holds {base}>, or a network"):
        source(**COLOUR, root=str(tmp_path / "new")).load()
    assert list(tmp_path.iterdir()) == []


# STL-10: raw binary ---------------------------------------------------------------------------------------------------


def write_stl(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir()
    pixels = random.integers(0, 256, (40, 3, 96, 96), dtype=np.uint8)
    for part, n in (("train", 40), ("test", 20), ("unlabeled", 30)):
        pixels[:n].transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # column-major
        if part != "unlabeled":
            (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(folder / f"{part}_y.bin")  # labels from 1
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    (folder / "fold_indices.txt").write_text("0 1 2\n")
    for name in ("train_list", "test_list"):
        files = [[file, md5(folder / file)] for file, _ in getattr(STL10Reader, name)]
        monkeypatch.setattr(STL10Reader, name, files)
    return pixels


def test_stl10_pretrains_on_the_unlabelled_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_stl(tmp_path, monkeypatch)
    splits = STL10(**COLOUR, root=str(tmp_path)).load()
    assert torch.equal(splits.pretrain.images, torch.from_numpy(pixels[:30]))
    assert splits.pretrain.images.shape[-1] == STL10.image_size
    assert set(splits.pretrain.labels.tolist()) == {-1}
    assert len(splits.train) + len(splits.validation) == 40
    assert splits.test.labels.tolist() == [i % 10 for i in range(20)]
    assert len(STL10(**{**COLOUR, "validation": 0.5}, root=str(tmp_path), limit=20).load().pretrain) == 20
    truncate(tmp_path / "stl10_binary" / "unlabeled_X.bin")
    with pytest.raises(UserError, match=r"unlabeled_X\.bin: truncated or corrupt"):
        STL10(**COLOUR, root=str(tmp_path)).load()


# SVHN: MATLAB files ---------------------------------------------------------------------------------------------------


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


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_svhn(tmp_path, monkeypatch)
    splits = SVHN(**COLOUR, root=str(tmp_path)).load()
    assert torch.equal(splits.test.images, torch.from_numpy(pixels[:20]).permute(0, 3, 1, 2))
    assert splits.test.images.is_contiguous()
    assert splits.test.images.shape[-1] == SVHN.image_size
    assert splits.test.labels.tolist() == [(i + 1) % 10 for i in range(20)]
    truncate(tmp_path / "test_32x32.mat")
    with pytest.raises(UserError, match=r"test_32x32\.mat: truncated or corrupt .*delete it"):
        SVHN(**COLOUR, root=str(tmp_path)).load()


def test_svhn_counts_labels_and_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch, labels=30)
    with pytest.raises(UserError, match=r"train_32x32\.mat: 40 images but 30 labels"):
        SVHN(**COLOUR, root=str(tmp_path)).load()
    with pytest.raises(UserError, match=r"the folder that holds train_32x32\.mat>, or a network"):
        SVHN(**COLOUR, root=str(tmp_path / "new")).load()
    assert not (tmp_path / "new").exists()

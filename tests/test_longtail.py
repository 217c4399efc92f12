"""Long tails: the published counts, what is thinned and what is not, and accuracy by the number of images."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import COLOUR, digits, image_bytes, write_cifar

from scclr.datasets import ImageSet, Splits
from scclr.datasets.cifar10 import CIFAR10
from scclr.datasets.longtail import class_counts, groups
from scclr.evaluate.features import pixels
from scclr.evaluate.knn import Knn
from scclr.evaluate.logreg import LogReg
from scclr.evaluate.ncc import NearestClassCentre
from scclr.evaluate.probe import probe
from scclr.evaluate.protocol import Features

PROTOCOLS = {
    "logreg": LogReg(l2=[1e-3], max_iter=50),
    "knn": Knn(k=[1], temperature=[0.1]),
    "ncc": NearestClassCentre(),
}


def test_published_counts() -> None:
    # CIFAR-10-LT with factor 100, as listed by the repositories that follow Cao et al. 2019; CIFAR-100-LT has 10,847.
    assert class_counts(5000, 10, 100, "exponential") == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert class_counts(5000, 10, 10, "exponential") == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]
    assert sum(class_counts(500, 100, 100, "exponential")) == 10_847
    assert class_counts(5000, 10, 100, "step") == [5000] * 5 + [50] * 5
    assert class_counts(100, 5, 10, "step") == [100, 100, 100, 10, 10]


@given(st.integers(1, 5000), st.integers(2, 40), st.integers(1, 200), st.sampled_from(["exponential", "step"]))
def test_counts_fall_from_most_by_the_imbalance(most: int, classes: int, imbalance: int, profile: str) -> None:
    counts = class_counts(most, classes, imbalance, profile)
    assert (len(counts), counts[0], counts[-1]) == (classes, most, most // imbalance)
    assert counts == sorted(counts, reverse=True)


def test_groups_follow_the_thresholds_of_imagenet_lt() -> None:
    assert groups([1280, 101, 100, 20, 19, 5]) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}
    assert groups([101, 11]) == {}, "no long tail"


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_only_training_images_are_thinned(profile: str) -> None:
    full, tail = digits().load(), digits(imbalance=10, imbalance_profile=profile).load()
    for part in ("validation", "test"):
        assert torch.equal(getattr(tail, part).images, getattr(full, part).images)
    assert tail.pretrain is tail.train
    most = int(torch.bincount(full.train.labels).min())
    assert torch.bincount(tail.train.labels).tolist() == class_counts(most, 10, 10, profile)
    assert image_bytes(tail.train) < image_bytes(full.train)
    assert full.refit
    assert not tail.refit
    assert full.groups == {}


def test_a_tail_is_seeded_nested_and_follows_classes() -> None:
    def images(**changes: object) -> set[bytes]:
        return image_bytes(digits(**changes).load().train)

    assert images(imbalance=10) == images(imbalance=10) > images(imbalance=20)
    assert images(imbalance=10) != images(imbalance=10, split_seed=1)
    some = digits(imbalance=5, classes=[7, 2], limit=200).load()
    assert some.classes == ("7", "2")
    assert torch.bincount(some.train.labels).tolist() == [75, 15]


def test_cifar_pretrains_on_the_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, CIFAR10, monkeypatch)  # 40 of each class, 10 of them to choose on
    splits = CIFAR10(**COLOUR, root=str(tmp_path), imbalance=10).load()
    assert torch.bincount(splits.pretrain.labels).tolist() == class_counts(30, 10, 10, "exponential")
    assert torch.bincount(splits.validation.labels).tolist() == [10] * 10
    assert splits.groups == {"medium": [0, 1], "few": [2, 3, 4, 5, 6, 7, 8, 9]}


def test_accuracy_by_the_number_of_images() -> None:
    """One feature a class: a class without training images is never predicted, so the groups' accuracies are known."""
    counts, eye = [150, 120, 50, 10], torch.eye(4)

    def part(labels: list[int], wrong: int = 0) -> ImageSet:
        images = eye[torch.tensor(labels)]
        images[:wrong] = eye[3]  # the first test images look like the last class
        return ImageSet((images * 255).byte().view(-1, 1, 2, 2), torch.tensor(labels))

    train = part([c for c, n in enumerate(counts) for _ in range(n)])
    test = part([0] * 4 + [1] * 2 + [2] * 2 + [3] * 2, wrong=2)
    splits = Splits(train, train, part([0, 1, 2, 3]), test, ("a", "b", "c", "d"), (0.5,), (0.5,), refit=False)
    parts = ((pixels(part), part.labels) for part in (splits.train, splits.validation, splits.test))
    for outcome in probe(Features(*parts, splits), PROTOCOLS).values():
        metrics = outcome.metrics
        assert metrics["top1"] == pytest.approx(0.8)
        assert metrics["top1/many"] == pytest.approx((0.5 + 1) / 2)  # over classes; over images it would be 4 / 6
        assert metrics["top1/medium"] == metrics["top1/few"] == 1
        assert metrics["balanced"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_a_balanced_validation_split_is_not_fitted() -> None:
    """Test images of class 1 lie beside validation images of class 0, and farther off beside training images of 1."""

    def part(values: list[int], labels: list[int]) -> ImageSet:
        images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
        return ImageSet(images, torch.tensor(labels))

    def represent(data: ImageSet) -> torch.Tensor:
        angle = data.images.view(-1, 1) / 255
        return torch.cat([angle.cos(), angle.sin()], 1)

    train, validation, test = part([20, 60] * 5, [0, 1] * 5), part([200] * 5, [0] * 5), part([210] * 5, [1] * 5)
    features = [(represent(part), part.labels) for part in (train, validation, test)]
    for refit, expected in ((True, 0), (False, 1)):
        splits = Splits(train, train, validation, test, ("a", "b"), (0.5,), (0.5,), refit)
        assert probe(Features(*features, splits), PROTOCOLS)["knn-v1"].metrics["top1"] == expected

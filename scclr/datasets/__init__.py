"""Image sets, as uint8 tensors or on disk, and how they are split.

A dataset is one file here with a ``Source`` subclass whose ``read`` parses the files, and one YAML that names it.
``Source.load`` does the rest, the same for all: it takes a subset, sets the validation split apart, and says what is
wrong.

Dimensions: N images, C channels, H x W pixels.
"""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scclr.config.errors import UserError, require
from scclr.datasets import longtail
from scclr.datasets.files import OnDisk
from scclr.datasets.longtail import class_counts

CLASS_FOLDERS_ADVICE = "give dataset.root=<a folder with one folder for each class>"
LEAST_STD = 1e-4  # a tenth of what rounding to 256 levels leaves of a channel; pixels divided by less overflow


@dataclass(frozen=True)
class ImageSet:
    """``images`` uint8 [N, C, H, W], in memory or on disk, and ``labels`` int64 [N], -1 where there is none."""

    images: Tensor | OnDisk
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "ImageSet":
        images = self.images if isinstance(self.images, OnDisk) else self.images.to(device)
        return ImageSet(images, self.labels.to(device))

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The images in order, at most ``size`` at once: uint8 [n, C, H, W] on the device of the labels."""
        if not isinstance(self.images, OnDisk):
            yield from self.images.split(size)
            return
        device = self.labels.device
        for block, _ in self.images.iterate(size, pin=device.type == "cuda"):
            yield block.to(device, non_blocking=True)


@dataclass(frozen=True)
class Splits:
    """What a run sees. Choices are made on ``validation``; ``test`` is used once, at the end.

    ``pretrain`` is ``train``, unless the dataset has an unlabelled part (STL-10). A dataset without any labels has no
    ``classes`` and an empty ``test``. ``mean`` and ``std`` are per channel, of pixels in [0, 1]. ``refit`` says that
    ``validation`` has the class proportions of ``train``, so that the final classifier may be fitted on both; with a
    long-tailed ``train`` it has not.
    """

    pretrain: ImageSet
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    refit: bool = True

    @property
    def groups(self) -> dict[str, list[int]]:
        """The classes with many, medium and few training images; empty unless these are a long tail."""
        counts = torch.bincount(self.train.labels, minlength=len(self.classes)).tolist() if self.classes else []
        return longtail.groups(counts) if counts else {}

    def to(self, device: torch.device) -> "Splits":
        train = self.train.to(device)
        pretrain = train if self.pretrain is self.train else self.pretrain.to(device)
        return replace(
            self, pretrain=pretrain, train=train, validation=self.validation.to(device), test=self.test.to(device)
        )


class Parts(NamedTuple):
    """What the files hold: the official splits, before any subset. ``load`` carves missing ones from ``train``.

    Without ``classes``, ``train`` has no labels, and there are no other parts.
    """

    train: ImageSet
    test: ImageSet | None
    classes: Sequence[str]
    unlabelled: ImageSet | None = None
    validation: ImageSet | None = None


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What every dataset has in common.

    Args:
        limit: at most this many labelled training images, stratified, validation included (and as many unlabelled).
        classes: keep these labels only, renumbered from 0 in this order.
        validation: share of the training images that is held out to choose on; null where such a split is published.
        test: share of all images that is held out to report on, for a dataset without a test split of its own.
        split_seed: seed of the splits; runs that differ in ``seed`` alone have the same splits.
        mean, std: per channel, of training pixels in [0, 1]; std is at least 1e-4.
        imbalance: thin the training images to a long tail, whose first class has this many times the images of the last
            (``longtail.class_counts``, from the count of the smallest class). Validation and test images are set apart
            before, so they are not thinned; nor is an unlabelled part.
        imbalance_profile: ``exponential`` or ``step``.

    Raises:
        ValueError: an argument out of range, or mean and std that do not fit together.
    """

    limit: int | None = None
    classes: list[int] | None = None
    validation: float | None
    split_seed: int = 0
    mean: list[float]
    std: list[float]
    test: float | None = None
    imbalance: float | None = None
    imbalance_profile: str = longtail.PROFILES[0]
    published: ClassVar[bool] = False  # the name says what the data is, and the files are checked by checksum or count

    def __post_init__(self) -> None:
        for name, share in (("validation", self.validation), ("test", self.test)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}={share}: give a share between 0 and 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: give at least 1 image, or null for all")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"classes={self.classes}: give two or more different labels, or null for all")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed={self.split_seed}: give a number from 0 to {2**32 - 1}")
        if self.imbalance is not None and not 1 <= self.imbalance < math.inf:
            raise ValueError(f"imbalance={self.imbalance}: give the ratio of the largest class to the smallest, from 1")
        if self.imbalance_profile not in longtail.PROFILES:
            raise ValueError(f"imbalance_profile={self.imbalance_profile}: choose {' or '.join(longtail.PROFILES)}")
        in_range = all(0 <= m <= 1 for m in self.mean) and all(LEAST_STD <= s <= 1 for s in self.std)
        if not in_range or not 0 < len(self.mean) == len(self.std):
            advice = f"give one of each per channel, mean from 0 to 1, std from {LEAST_STD} to 1"
            raise ValueError(f"mean={self.mean} and std={self.std}: {advice}")
        for name in ("root", "cache"):
            if getattr(self, name, None) == "":
                raise ValueError(f"{name} is empty: give a folder; dataset.{name}=. is the current one")

    @abstractmethod
    def read(self) -> Parts:
        """Parse the files.

        Raises:
            UserError: a missing, truncated or corrupt file; the message names it and what to do.
        """

    def digest(self) -> str:
        """What identifies the data besides the arguments but ``root``: a hash, empty for a published dataset.

        Raises:
            UserError: as ``read``.
        """
        root = None if self.published else getattr(self, "root", None)
        return "" if root is None else hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]

    @property
    def streamed(self) -> bool:
        """Whether image files are decoded for every batch. Then training sees crops of them only."""
        return False

    def materialize(self, data: ImageSet) -> ImageSet:
        """A split, once it is known which images it has, in the form that is used: in memory or on disk."""
        return data

    def load(self, check: Callable[[Splits], None] | None = None) -> Splits:
        """Read, take a subset, split: a function of the files and the arguments alone.

        Args:
            check: is called with the splits before image files are decoded or a cache is built, and again if broken
                files were left out. It raises an error if a run could not use them.

        Raises:
            UserError: as ``read`` and ``materialize``; another number of channels than ``mean`` has, or a subset that
                leaves too few images of a class to split.
        """
        splits = self._split()
        if check is not None:
            check(splits)
        train, validation, test = (
            self._readable(part, name, splits.classes)
            for name, part in (("training", splits.train), ("validation", splits.validation), ("test", splits.test))
        )
        pretrain = train if splits.pretrain is splits.train else splits.pretrain
        loaded = replace(splits, pretrain=pretrain, train=train, validation=validation, test=test)
        if check is not None and len(train) + len(validation) < len(splits.train) + len(splits.validation):
            check(loaded)
        return loaded

    def _readable(self, data: ImageSet, split: str, classes: Sequence[str]) -> ImageSet:
        """``materialize``, which leaves broken files out, but no class."""
        found = self.materialize(data)
        missing = sorted(set(data.labels.tolist()) - set(found.labels.tolist()))
        lost = [classes[label] if classes else "unlabelled" for label in missing]
        message = f"no readable {split} image is left of {len(lost)} classes, such as {lost[:1]}"
        require(not lost, f"{message}; replace the broken files")
        return found

    def _split(self) -> Splits:
        full, held_out, names, unlabelled, validation = self.read()
        channels = full.images.shape[1]
        advice = f"the images have {channels} channels; give mean and std of each"
        require(len(self.mean) == channels, f"dataset.mean={self.mean}: {advice}")
        if not names:
            return self._split_unlabelled(full)
        if self.classes is not None:
            outside = [c for c in self.classes if not 0 <= c < len(names)]
            require(not outside, f"dataset.classes={outside}: labels run from 0 to {len(names) - 1}")
            names = [names[c] for c in self.classes]
            full = _keep(full, self.classes)
            held_out = held_out and _keep(held_out, self.classes)
            validation = validation and _keep(validation, self.classes)
        for part in (part for part in (held_out, validation) if part is not None):
            other = sorted(set(part.labels.tolist()) - set(full.labels.tolist()))
            extra = f"{len(other)} classes have no training image, such as {[names[c] for c in other[:1]]}"
            require(not other, f"{extra}; give some, or choose others: dataset.classes=[<numbers>]")
        if held_out is None:
            full, held_out = self._carve(full, self.test, "test", names)
        if self.limit is not None and self.limit < len(full):
            full, _ = self._carve(full, len(full) - self.limit, "limit", names)
        refit = self.imbalance is None and validation is None
        if validation is None:
            full, validation = self._carve(full, self.validation, "validation", names)
        train = full if self.imbalance is None else self._thin(full, self.imbalance, names)
        pretrain = train
        if unlabelled is not None:
            order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(unlabelled)))
            pretrain = unlabelled if self.limit is None else unlabelled[order[: self.limit]]
        mean, std = tuple(self.mean), tuple(self.std)
        return Splits(pretrain, train, validation, held_out, tuple(names), mean, std, refit)

    def _split_unlabelled(self, data: ImageSet) -> Splits:
        """A share for ``validation``, on which quality without labels can be measured. Nothing is held out to test."""
        for key, value in (("classes", self.classes), ("imbalance", self.imbalance)):
            require(value is None, f"dataset.{key}={value} needs labels, and these images have none: drop it")
        order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(data)))[: self.limit]
        held_out = 0 if self.validation is None else round(self.validation * len(order))
        message = f"dataset.validation={self.validation} leaves none of {len(order)} images to train on; give a smaller"
        require(held_out < len(order), message)
        validation, train = (data[part.sort().values] for part in (order[:held_out], order[held_out:]))
        return Splits(train, train, validation, train[slice(0)], (), tuple(self.mean), tuple(self.std))

    def _thin(self, data: ImageSet, imbalance: float, names: Sequence[str]) -> ImageSet:
        """A long tail of ``data``: the first images of every class, in an order that depends on ``split_seed``."""
        require(len(names) > 1, f"dataset.imbalance={imbalance:g} needs two classes or more: {CLASS_FOLDERS_ADVICE}")
        most = int(torch.bincount(data.labels, minlength=len(names)).min())
        counts = class_counts(most, len(names), imbalance, self.imbalance_profile)
        advice = f"give at most {most}, its images of the smallest class"
        require(min(counts) > 0, f"dataset.imbalance={imbalance:g} leaves no image of class {names[-1]}: {advice}")
        order = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(data)))
        kept = [order[data.labels[order] == c][:n] for c, n in enumerate(counts)]
        return data[torch.cat(kept).sort().values]

    def _carve(
        self, data: ImageSet, share: float | int | None, name: str, classes: Sequence[str]
    ) -> tuple[ImageSet, ImageSet]:
        """(the rest, a stratified part that has this share or count of the images)."""
        require(share is not None, f"dataset.{name} is null, and this dataset has no {name} split to fall back on")
        from sklearn.model_selection import train_test_split  # slow to import, and worker processes need it not

        rows, labels = np.arange(len(data)), data.labels.numpy()
        lone = [classes[c] for c in np.flatnonzero(np.bincount(labels) == 1).tolist()]
        split = f"dataset.{name}={getattr(self, name)} cannot split these {len(data)} images"
        limited = name == "validation" and self.limit is not None
        advice = "type a larger dataset.limit" if limited else "give more of them, or leave these classes out"
        require(not lone, f"{split}: {len(lone)} classes have one image only, such as {lone[:1]}; {advice}")
        try:
            rest, part = train_test_split(rows, test_size=share, stratify=labels, random_state=self.split_seed)
        except ValueError as error:
            message = f"{split}: each part takes an image of each of the {len(classes)} classes"
            raise UserError(f"{message}; give another number, or more images") from error
        return data[torch.from_numpy(rest)], data[torch.from_numpy(part)]


def _keep(data: ImageSet, classes: Sequence[int]) -> ImageSet:
    """The images of ``classes``, whose labels become their positions in this list."""
    labels = torch.full_like(data.labels, -1)
    for new, old in enumerate(classes):
        labels[data.labels == old] = new
    return ImageSet(data.images, labels)[labels >= 0]

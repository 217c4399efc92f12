"""ImageNet-LT (Liu et al. 2019): 115,846 long-tailed training images of ImageNet-1k, 1,280 to 5 of a class.

The validation split has 20 of ImageNet's training images of each class; the test split is ImageNet's 50,000 validation
images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from scclr.config.errors import require
from scclr.datasets import Parts
from scclr.datasets.imagefolder import ImageFolder, refuse_outside
from scclr.datasets.imagenet import CLASSES
from scclr.datasets.reading import reading

LISTS_ADVICE = (
    "put ImageNet_LT_{train,val,test}.txt (github.com/zhmiao/OpenLongTailRecognition-OLTR) beside train/ and val/"
)


@dataclass(frozen=True, kw_only=True)
class ImageNetLT(ImageFolder):
    """Read from ImageNet's tree, by the published lists ``<root>/ImageNet_LT_{train,val,test}.txt``.

    Their lines are ``train/<WordNet id>/<file> <label>``, or ``val/...`` in the test list.

    Raises:
        ValueError: a share for the validation split, although one is published.
    """

    published: ClassVar[bool] = True
    counts: ClassVar[dict[str, int]] = {"train": 115_846, "val": 20_000, "test": 50_000}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation is not None:
            raise ValueError(f"validation={self.validation}: the validation split is published; give null")

    def read(self) -> Parts:
        lists = {part: self._list(part) for part in self.counts}
        ids = [""] * CLASSES
        for name, label in lists["train"]:
            ids[label] = name.split("/")[1]
        for part, rows in lists.items():
            other = next((name for name, label in rows if name.split("/")[1] != ids[label]), None)
            require(other is None, f"{self._path(part)}: {other} has the label of another class; {LISTS_ADVICE}")
        missing = [f"train/{name}" for name in ids if not (Path(self.root) / "train" / name).is_dir()]
        require(not missing, f"{self.root}: no folder {missing[:1]}; give dataset.root=<the folder of train/ and val/>")
        train, validation, test = (
            self.image_set(Path(self.root), [name for name, _ in rows], torch.tensor([label for _, label in rows]))
            for rows in lists.values()
        )
        return Parts(train, test, ids, validation=validation)

    def _path(self, part: str) -> Path:
        return Path(self.root) / f"ImageNet_LT_{part}.txt"

    def _list(self, part: str) -> list[tuple[str, int]]:
        path, wanted = self._path(part), self.counts[part]
        with reading(path, LISTS_ADVICE):
            lines = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
            rows = [(name, int(label)) for name, label in lines]
        require(len(rows) == wanted, f"{path}: {len(rows):,} lines instead of {wanted:,}; {LISTS_ADVICE}")
        names = [name for name, _ in rows]
        other = next((name for name in names if name.count("/") != 2), None)
        require(other is None, f"{path}: {other} is not <folder>/<WordNet id>/<file>; {LISTS_ADVICE}")
        refuse_outside(path, names, LISTS_ADVICE)
        labels = {label for _, label in rows}
        message = f"{path}: {len(labels):,} labels instead of 0 to {CLASSES - 1}; {LISTS_ADVICE}"
        require(labels == set(range(CLASSES)), message)
        return rows

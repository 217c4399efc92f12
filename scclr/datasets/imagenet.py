"""ImageNet-1k (Russakovsky et al. 2015): 1,281,167 + 50,000 colour photographs, 1,000 classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from scclr.config.errors import require
from scclr.datasets import Parts
from scclr.datasets.imagefolder import ImageFolder
from scclr.datasets.listing import class_folders
from scclr.datasets.reading import reading

CLASSES = 1000
TREE_ADVICE = "give dataset.root=<the folder of train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG>"


@dataclass(frozen=True, kw_only=True)
class ImageNet(ImageFolder):
    """``<root>/train/<WordNet id>/*.JPEG`` and ``<root>/val/<WordNet id>/*.JPEG``; the latter are the test split.

    Classes are in the order of their WordNet ids. The number of images shows whether the archives were unpacked to the
    end.
    """

    published: ClassVar[bool] = True
    counts: ClassVar[tuple[int, int]] = (1_281_167, 50_000)

    def read(self) -> Parts:
        root = Path(self.root)
        train, ids = self.tree(root / "train", self.ids(), wanted=self.counts[0], advice=TREE_ADVICE)
        test, _ = self.tree(root / "val", ids, wanted=self.counts[1], advice=TREE_ADVICE)
        return Parts(train, test, ids)

    def ids(self) -> list[str]:
        """The WordNet ids of the classes."""
        folder = Path(self.root) / "train"
        with reading(folder, TREE_ADVICE):
            found = class_folders(folder)
        require(len(found) == CLASSES, f"{folder}: {len(found)} class folders instead of {CLASSES:,}; {TREE_ADVICE}")
        return found

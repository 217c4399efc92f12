"""STL-10 (Coates, Ng & Lee 2011): 100,000 unlabelled, 5,000 + 8,000 labelled colour images of 96 x 96 pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import STL10 as Reader

from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.reading import check_files, downloading, reading


@dataclass(frozen=True, kw_only=True)
class STL10(Source):
    """Pretrains on the unlabelled split (2.6 GiB of uint8), probes on the labelled one.

    Read from ``<root>/stl10_binary``, which torchvision downloads if it is absent. ``classes`` selects among the
    labelled images only.
    """

    root: str
    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 96

    def read(self) -> Parts:
        root = Path(self.root)
        folder = root / Reader.base_folder
        if not folder.exists():
            with downloading(root, f"give dataset.root=<the folder that holds {Reader.base_folder}>, or a network"):
                Reader(str(root), download=True)
        advice = f"delete {folder} to download it again"
        check_files(folder, [*Reader.train_list, *Reader.test_list], advice)
        with reading(folder, advice):
            train, test, unlabelled = (Reader(str(root), split=name) for name in ("train", "test", "unlabeled"))
        return Parts(_image_set(train), _image_set(test), train.classes, _image_set(unlabelled))


def _image_set(part: Reader) -> ImageSet:
    return ImageSet(torch.from_numpy(part.data), torch.from_numpy(part.labels).long())

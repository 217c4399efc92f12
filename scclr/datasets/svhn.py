"""SVHN (Netzer et al. 2011): 73,257 + 26,032 colour images of 32 x 32 pixels, house numbers cropped to one digit."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import SVHN as Reader

from scclr.config.errors import require
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.reading import check_files, downloading, reading


@dataclass(frozen=True, kw_only=True)
class SVHN(Source):
    """Read from ``<root>/train_32x32.mat`` and ``test_32x32.mat``, which torchvision downloads if both are absent.

    The 531,131 easier ``extra`` images are not used.
    """

    root: str
    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 32

    def read(self) -> Parts:
        root = Path(self.root)
        files = [Reader.split_list[part][1:] for part in ("train", "test")]
        if not any((root / name).exists() for name, _ in files):
            with downloading(root, "give dataset.root=<the folder that holds train_32x32.mat>, or a network"):
                for part in ("train", "test"):
                    Reader(str(root), split=part, download=True)
        check_files(root, files, "delete it to download it again")
        train, test = (_image_set(root, part) for part in ("train", "test"))
        return Parts(train, test, [str(digit) for digit in range(10)])


def _image_set(root: Path, part: str) -> ImageSet:
    path = root / Reader.split_list[part][1]
    with reading(path, "delete it to download it again"):
        read = Reader(str(root), split=part)
    images, labels = torch.from_numpy(read.data).contiguous(), torch.from_numpy(read.labels)  # [N, 3, 32, 32], [N]
    require(len(images) == len(labels), f"{path}: {len(images)} images but {len(labels)} labels; delete it")
    return ImageSet(images, labels)

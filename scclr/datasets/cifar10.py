"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 pixels, 10 classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision.datasets import CIFAR10 as Reader

from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.reading import check_files, downloading, reading


@dataclass(frozen=True, kw_only=True)
class CIFAR10(Source):
    """Read from ``<root>/cifar-10-batches-py``, which torchvision downloads if it is absent."""

    root: str
    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 32
    reader: ClassVar[Any] = Reader

    def read(self) -> Parts:
        reader, root = self.reader, Path(self.root)
        folder = root / reader.base_folder
        if not folder.exists():
            with downloading(root, f"give dataset.root=<the folder that holds {reader.base_folder}>, or a network"):
                reader(str(root), download=True)
        advice = f"delete {folder} to download it again"
        files = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
        check_files(folder, files, advice)
        with reading(folder, advice):
            train, test = (reader(str(root), train=part) for part in (True, False))
        return Parts(_image_set(train), _image_set(test), train.classes)


def _image_set(part: Any) -> ImageSet:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # [N, 3, 32, 32]
    return ImageSet(images, torch.tensor(part.targets))

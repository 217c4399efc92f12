"""Tiny ImageNet (Stanford CS231n, 2015): 100,000 + 10,000 colour images of 64 x 64 pixels, 200 classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets.utils import download_and_extract_archive

from scclr.config.errors import require
from scclr.datasets import Parts
from scclr.datasets.imagefolder import ImageFolder, refuse_outside
from scclr.datasets.reading import downloading, reading

FOLDER = "tiny-imagenet-200"
URL, MD5 = f"http://cs231n.stanford.edu/{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True, kw_only=True)
class TinyImageNet(ImageFolder):
    """Read from ``<root>/tiny-imagenet-200`` as it comes out of its zip, which is downloaded if it is absent.

    The official validation images, named in ``val/val_annotations.txt``, are the test split; those of ``test`` have no
    labels. Classes are in the order of their WordNet ids, as in a folder listing, and named by their first word.
    """

    published: ClassVar[bool] = True
    counts: ClassVar[tuple[int, int]] = (100_000, 10_000)

    def read(self) -> Parts:
        folder = Path(self.root) / FOLDER
        if not folder.exists():
            with downloading(Path(self.root), f"give dataset.root=<the folder that holds {FOLDER}>, or a network"):
                download_and_extract_archive(URL, self.root, md5=MD5, remove_finished=True)
        advice, notes = f"delete {folder} to download it again", folder / "val" / "val_annotations.txt"
        with reading(folder, advice):
            ids = sorted((folder / "wnids.txt").read_text().split())
            words = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
            classes = [words[name].split(",")[0] for name in ids]
            rows = [line.split("\t") for line in notes.read_text().splitlines()]
            names, labels = [row[0] for row in rows], [ids.index(row[1]) for row in rows]
        count = f"{len(names):,} lines instead of {self.counts[1]:,}"
        require(len(names) == self.counts[1], f"{notes}: {count}; {advice}")
        refuse_outside(notes, [*ids, *names], advice)
        train, _ = self.tree(folder / "train", ids, wanted=self.counts[0], advice=advice)
        return Parts(train, self.image_set(folder / "val" / "images", names, torch.tensor(labels)), classes)

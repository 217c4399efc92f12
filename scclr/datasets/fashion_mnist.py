"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import FashionMNIST as Reader

from scclr.datasets import ImageSet, Parts, Source, check_files, reading

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Source):
    """The four idx files, gzipped, are looked for in ``root``; a null ``root`` means Debian's folder, else ``data``.

    Where they are absent, torchvision downloads them to ``<root>/FashionMNIST/raw``.
    """

    root: str | None

    def read(self) -> Parts:
        root = Path(self.root or (DEBIAN if DEBIAN.is_dir() else "data"))
        flat = any((root / name).exists() for name, _ in Reader.resources)
        folder = root if flat or root == DEBIAN else root / "FashionMNIST" / "raw"
        advice = (
            "type `apt-get install dataset-fashion-mnist`, or give a writable dataset.root=<folder> and a network "
            "for torchvision to download it"
        )
        if folder not in (root, DEBIAN) and not any((folder / name).exists() for name, _ in Reader.resources):
            with reading(folder, advice):
                Reader(str(root), download=True)
        check_files(folder, Reader.resources, advice)
        with tempfile.TemporaryDirectory() as scratch, reading(folder, advice):
            # torchvision reads unpacked files from a layout of its own: let it unpack these, found by symbolic link.
            raw = Path(scratch) / "FashionMNIST" / "raw"
            raw.mkdir(parents=True)
            for name, _ in Reader.resources:
                (raw / name).symlink_to((folder / name).resolve())
            train, test = (Reader(scratch, train=part, download=True) for part in (True, False))
            return Parts(
                ImageSet(train.data.unsqueeze(1), train.targets),
                ImageSet(test.data.unsqueeze(1), test.targets),
                Reader.classes,
            )

"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes."""

import gzip
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.datasets import FashionMNIST as Reader
from torchvision.datasets.mnist import read_image_file, read_label_file

from scclr.config import require
from scclr.datasets import ImageSet, Parts, Source, downloading, reading

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
ADVICE = (
    "type `apt-get install dataset-fashion-mnist`, or give a writable dataset.root=<folder> and a network for "
    "torchvision to download it"
)


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Source):
    """The four idx files, gzipped or not, of ``root``; a null ``root`` means Debian's folder, else ``data``.

    They lie in ``root`` itself or in ``<root>/FashionMNIST/raw``, where torchvision downloads (and checksums) them if
    there are none. Gzip's CRC-32 guards packed files: Debian packs them anew, so torchvision's MD5 does not apply.
    """

    root: str | None

    def read(self) -> Parts:
        root = Path(self.root or (DEBIAN if DEBIAN.is_dir() else "data"))
        raw = root / "FashionMNIST" / "raw"
        folder = next((f for f in (root, raw) if list(f.glob("*-ubyte*"))), raw)
        if folder == raw and not list(raw.glob("*-ubyte*")):
            with downloading(raw, ADVICE):
                Reader(str(root), download=True)
        train, test = (_image_set(folder, part) for part in ("train", "t10k"))
        return Parts(train, test, Reader.classes)


def _image_set(folder: Path, part: str) -> ImageSet:
    images, labels = _parse(folder / f"{part}-images-idx3-ubyte"), _parse(folder / f"{part}-labels-idx1-ubyte")
    require(len(images) == len(labels), f"{folder}: {len(images)} images but {len(labels)} labels of {part}; {ADVICE}")
    return ImageSet(images.unsqueeze(1), labels)


def _parse(path: Path) -> Tensor:
    packed = path.with_name(f"{path.name}.gz")
    require(path.exists() or packed.exists(), f"{packed}: no such file; {ADVICE}")
    parse = read_image_file if "images" in path.name else read_label_file
    if path.exists():
        with reading(path, ADVICE):
            return parse(str(path))
    with tempfile.NamedTemporaryFile() as plain, reading(packed, ADVICE):
        with gzip.open(packed) as file:
            shutil.copyfileobj(file, plain)
        plain.flush()
        return parse(plain.name)

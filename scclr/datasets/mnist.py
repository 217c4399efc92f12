"""MNIST (LeCun et al. 1998): 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes, in four idx files."""

import gzip
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torchvision.datasets import MNIST as Reader
from torchvision.datasets.mnist import read_image_file, read_label_file

from scclr.config.errors import require
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.reading import downloading, reading, wait_for_download


@dataclass(frozen=True, kw_only=True)
class MNIST(Source):
    """Read from four idx files, gzipped or not, in ``root``. null means ``installed`` if that exists, else ``data``.

    They lie in ``root`` itself or in ``<root>/MNIST/raw``, where torchvision downloads (and checks) them if there are
    none. Packed files are checked by gzip's CRC-32: Debian packs them anew, so torchvision's MD5 does not apply.
    """

    root: str | None
    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 28
    reader: ClassVar[Any] = Reader
    installed: ClassVar[Path | None] = None
    advice: ClassVar[str] = "give dataset.root=<the folder of the four idx files>, or a network to download them"

    def read(self) -> Parts:
        default = self.installed if self.installed and self.installed.is_dir() else "data"
        root = Path(self.root or default)
        raw = root / self.reader.__name__ / "raw"
        wait_for_download(raw)
        folder = next((f for f in (root, raw) if list(f.glob("*-ubyte*"))), None)
        if folder is None:
            folder = raw
            with downloading(raw, self.advice):
                self.reader(str(root), download=True)
        train, test = (self._image_set(folder, part) for part in ("train", "t10k"))
        return Parts(train, test, self.reader.classes)

    def _image_set(self, folder: Path, part: str) -> ImageSet:
        images = self._parse(folder / f"{part}-images-idx3-ubyte")
        labels = self._parse(folder / f"{part}-labels-idx1-ubyte")
        counts = f"{folder}: {len(images)} images but {len(labels)} labels of {part}"
        require(len(images) == len(labels), f"{counts}; {self.advice}")
        return ImageSet(images.unsqueeze(1), labels)

    def _parse(self, path: Path) -> Tensor:
        packed = path.with_name(f"{path.name}.gz")
        require(path.exists() or packed.exists(), f"{packed}: no such file; {self.advice}")
        parse = read_image_file if "images" in path.name else read_label_file
        if path.exists():
            with reading(path, self.advice):
                return parse(str(path))
        with tempfile.NamedTemporaryFile() as plain, reading(packed, self.advice):
            with gzip.open(packed) as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
            return parse(plain.name)

"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torchvision.datasets import FashionMNIST as Reader

from scclr.datasets.mnist import MNIST


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(MNIST):
    """As MNIST; read from Debian's folder if it is installed, else from ``<root>/FashionMNIST/raw``."""

    reader: ClassVar[Any] = Reader
    installed: ClassVar[Path | None] = Path("/usr/share/datasets/fashion-mnist")
    advice: ClassVar[str] = (
        "type `apt-get install dataset-fashion-mnist`, or give a writable dataset.root=<folder> and a network for "
        "torchvision to download it"
    )

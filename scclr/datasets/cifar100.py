"""CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32 x 32 pixels, 100 fine classes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torchvision.datasets import CIFAR100 as Reader

from scclr.datasets.cifar10 import CIFAR10


@dataclass(frozen=True, kw_only=True)
class CIFAR100(CIFAR10):
    """Read from ``<root>/cifar-100-python``, which torchvision downloads if it is absent."""

    reader: ClassVar[Any] = Reader

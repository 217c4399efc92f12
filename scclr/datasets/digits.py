"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, 10 classes, shipped inside its wheel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn.datasets import load_digits

from scclr.datasets import ImageSet, Parts, Source


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """The default dataset: nothing to download. It has no test split, so ``test`` sets the share that is set apart."""

    published: ClassVar[bool] = True
    image_size: ClassVar[int] = 8

    def read(self) -> Parts:
        digits = load_digits()  # values 0..16
        images = torch.from_numpy(digits.images).mul(255 / 16).round().byte()
        labels = torch.from_numpy(digits.target).long()
        return Parts(ImageSet(images.unsqueeze(1), labels), None, [str(name) for name in digits.target_names])

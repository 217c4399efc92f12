"""Features of invented classes, as the evaluation protocols are given them."""

import torch

from scclr.datasets import ImageSet, Splits
from scclr.evaluate.protocol import Features, Part


def features_of(train: Part, validation: Part, test: Part, *, classes: int, refit: bool = True) -> Features:
    """``Features`` of these parts. Their images have no pixels."""
    sets = [ImageSet(torch.empty(len(y), 1, 1, 1, dtype=torch.uint8), y) for _, y in (train, validation, test)]
    names = tuple(f"class {c}" for c in range(classes))
    return Features(train, validation, test, Splits(sets[0], *sets, names, (0.5,), (0.5,), refit))


def clusters(n: int, *, classes: int, width: int, apart: float, seed: int = 0) -> Part:
    """n features float32 [n, width] around a centre for each class, and labels int64 [n], which are equally many."""
    centres = apart * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    return centres[y] + torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), y


def three_parts(sizes: tuple[int, int, int] = (300, 90, 120), *, classes: int = 7, width: int = 8) -> Features:
    """Training, validation and test features that overlap in part."""
    parts = [clusters(n, classes=classes, width=width, apart=0.7, seed=seed) for seed, n in enumerate(sizes)]
    return features_of(*parts, classes=classes)

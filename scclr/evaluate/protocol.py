"""What an evaluation protocol sees and returns.

Dimensions: N images, D features, K classes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from scclr.datasets import Splits
from scclr.encoders.model import Model

Part = tuple[Tensor, Tensor]  # features [N, D] of any floating type, and labels int64 [N]


@dataclass(frozen=True)
class Features:
    """Features of the three splits, computed once for all protocols. Each part is the share of this process.

    Args:
        train, validation, test: features float32 [N, D] and labels int64 [N].
        splits: the images themselves, the names of the classes, and the groups of a long tail.
        model: what made the features; None if they are raw pixels.
        layer: ``h``, the encoder's output, or ``z``, the projector's.
        seed: of a protocol's own draws.
    """

    train: Part
    validation: Part
    test: Part
    splits: Splits
    model: Model | None = None
    layer: str = "h"
    batch_size: int = 512
    seed: int = 0

    @property
    def known(self) -> list[Part]:
        """What the tested fit may learn from: training images, and those of validation if ``splits.refit``."""
        return [self.train, self.validation] if self.splits.refit else [self.train]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.splits.classes)


@dataclass(frozen=True)
class Outcome:
    """The numbers of one protocol.

    Args:
        metrics: by name, such as ``top1``; accuracies are fractions in [0, 1]. The table of a run shows ``top1`` or
            ``nmi``, or else the first.
        validation: what the choice was made by, on the validation split; None without a choice.
        chosen: what was chosen there, and what the fit reports about itself.
        confusion: int64 [K, K] on the test split, rows the true classes; None if the protocol predicts no classes.
    """

    metrics: Mapping[str, float]
    validation: float | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    confusion: Tensor | None = None


class Protocol(ABC):
    """A protocol: ``protocol(features)`` chooses on the validation split, then tests once.

    ``version`` belongs to the names of its metrics. It changes when the same features would give another number.
    """

    version: ClassVar[int] = 1
    baselines: ClassVar[bool] = True  # whether the untrained encoder and raw pixels are evaluated too

    def check(self, splits: Splits) -> None:  # noqa: B027
        """Refuse data that do not allow this protocol, before anything is trained. Nothing is refused by default.

        Args:
            splits: their labels are whole in every process.

        Raises:
            UserError: the message says what to type instead; it is printed after ``probe.protocols.<name>: ``.
        """

    @abstractmethod
    def __call__(self, features: Features) -> Outcome:
        """Evaluate.

        Raises:
            UserError: the data or the encoder do not allow this protocol.
        """


def require_grid(name: str, values: Sequence[float], least: float, greatest: float) -> None:
    """Raise ``ValueError`` unless ``values`` are one or more different numbers in [least, greatest]."""
    fit = all(math.isfinite(value) and least <= value <= greatest for value in values)
    if not (fit and 0 < len(values) == len(set(values))):
        raise ValueError(f"{name}={list(values)}: give one or more different numbers, from {least:g} to {greatest:g}")


def require_number(name: str, value: float, least: float, greatest: float) -> None:
    """Raise ``ValueError`` unless ``value`` is in [least, greatest]."""
    if not least <= value <= greatest:
        raise ValueError(f"{name}={value}: give a number from {least:g} to {greatest:g}")

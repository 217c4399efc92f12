"""What an evaluation protocol sees and returns, and the metrics that classifiers share.

Dimensions: N images, D features, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from scclr.datasets import Splits
from scclr.encoders.model import Model
from scclr.evaluate.logreg import Part


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


@dataclass(frozen=True)
class Outcome:
    """The numbers of one protocol.

    Args:
        metrics: by name, such as ``top1``; accuracies are fractions in [0, 1].
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

    @abstractmethod
    def __call__(self, features: Features) -> Outcome:
        """Evaluate.

        Raises:
            UserError: the data or the encoder do not allow this protocol.
        """

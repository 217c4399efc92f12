"""What every loss is made of: the base class, the terms that it returns, and checks of its arguments."""

import math
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from scclr.losses.anchors import Anchors, GlobalBatch
from scclr.losses.pairs import full_precision


class LossTerms(NamedTuple):
    """Scalars: ``total`` is minimized; ``attract`` and ``repel`` are the terms A and R that it is made of."""

    total: Tensor
    attract: Tensor
    repel: Tensor


class LogSumExpForm(NamedTuple):
    """The repulsion of a loss whose R is a log-sum-exp of cosine similarities over all views of the other images.

    The positives are in the sum, or are left out, and A is the mean of -s_ip / tau over the positives.
    """

    temperature: float
    decoupled: bool  # the sum leaves out the views of the anchor's own image

    def collapsed(self, images: int, views: int) -> float:
        """A + R where all embeddings of ``images`` with ``views`` each coincide: the logarithm of the number of terms.

        This is NT-Xent, whatever alpha is. It is also the value where positives are as similar as all other pairs.
        """
        return math.log(views * (images - 1) if self.decoupled else views * images - 1)


class Loss(nn.Module):
    """A loss is called as ``loss(*views, labels=None, global_batch=None)``; every subclass defines its ``terms``.

    The views are V >= 2 tensors [B, P]. ``labels``, int64 [B], holds one class per image; only supervised losses read
    it. A call computes in float32 or wider, keeps no state, does not wait for the device, and lets NaN through to
    ``total``.

    Raises:
        ValueError: if alpha is outside [0, 1]; on call, if shapes do not fit, labels are missing, or there are fewer
            than ``least_images``.
    """

    supervised: ClassVar[bool] = False  # the loss reads labels, so it is an oracle and not a self-supervised method
    least_images: ClassVar[int] = 1

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        check_range(0, 1, alpha=alpha)
        self.alpha = alpha  # the balance; a schedule may change it between calls

    def forward(
        self, *views: Tensor, labels: Tensor | None = None, global_batch: GlobalBatch | None = None
    ) -> LossTerms:
        anchors = Anchors(views, labels, global_batch)
        if anchors.images < self.least_images:
            raise ValueError(f"{type(self).__name__} needs {self.least_images} images or more, not {anchors.images}")
        with full_precision(anchors.z.device):
            return self.terms(anchors)

    def terms(self, anchors: Anchors) -> LossTerms:
        """Scalars in nats, computed in float32 or wider."""
        raise NotImplementedError

    def logsumexp_form(self) -> LogSumExpForm | None:
        """The form of which thresholds of alpha are proved (``scclr.theory.thresholds.edges``), or None."""
        return None


class TemperatureLoss(Loss):
    """A loss whose similarities are divided by a temperature.

    Raises:
        ValueError: if alpha is outside [0, 1] or the temperature outside [1e-6, 1e6]; on call, as ``Loss``.
    """

    def __init__(self, *, alpha: float, temperature: float) -> None:
        super().__init__(alpha)
        check_positive(temperature=temperature)
        self.temperature = temperature


def balance(alpha: float, attract: Tensor, repel: Tensor) -> LossTerms:
    """total = 2 (alpha A + (1 - alpha) R) of scalars A and R."""
    return LossTerms(2 * (alpha * attract + (1 - alpha) * repel), attract, repel)


def check_range(least: float, greatest: float, **values: float) -> None:
    """Raise ``ValueError`` unless every value is a number in [least, greatest]."""
    for name, value in values.items():
        if not least <= value <= greatest:
            raise ValueError(f"{name}={value}: give a number from {least:g} to {greatest:g}")


def check_positive(**values: float) -> None:
    """Raise ``ValueError`` unless every value is in [1e-6, 1e6], where all losses are finite in float32."""
    check_range(1e-6, 1e6, **values)

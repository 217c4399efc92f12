"""Contrastive losses as attraction + repulsion. One loss per file; each is called as ``loss(z1, z2)``.

Dimensions: B images, V >= 2 views z1, z2, ... [B, P] with unit rows; s = z z^T are cosine similarities of the N = VB
views, tau the temperature.

    A   = mean_i mean_p -s_{ip} / tau                  attraction to the other views p of the same image
    R   = mean_i log sum_{k != i} exp(s_{ik} / tau)    repulsion from all other views

These are the terms of NT-Xent; every other loss states its own. ``total = 2 (alpha A + (1 - alpha) R)`` in all of
them, so that alpha = 0.5 is the plain sum A + R.
"""

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from scclr.losses.anchors import Anchors, Keys
from scclr.losses.pairs import full_precision

__all__ = ["Anchors", "Keys", "Loss", "LossTerms", "Softmax", "balance", "check_alpha", "check_positive"]


class LossTerms(NamedTuple):
    """Scalars: ``total`` is what is minimised; ``attract`` and ``repel`` are the terms A and R it is made of."""

    total: Tensor
    attract: Tensor
    repel: Tensor


class Softmax(NamedTuple):
    """A loss that repels by the log-sum-exp of cosine similarities: at which temperature, and over which views."""

    temperature: float | Tensor
    decoupled: bool  # over views of other images only, instead of all other views


class Loss(nn.Module):
    """A loss is called as ``loss(*views, labels=None, keys=None)``; a file here says what its ``terms`` are.

    Views are V >= 2 tensors [B, P]. ``labels``, int64 [B], one per image, are read by supervised losses only. A call
    computes in float32 or wider, changes no state, does not wait for the device, and lets NaN through to ``total``.

    Raises:
        ValueError: on call, shapes that do not fit, missing labels, or fewer images than the loss is defined for.
    """

    supervised: ClassVar[bool] = False  # it reads labels: an oracle, not a self-supervised method
    least_images: ClassVar[int] = 1
    alpha: float = 0.5  # the balance: a schedule may change it between calls of the losses that take one

    def forward(self, *views: Tensor, labels: Tensor | None = None, keys: Keys | None = None) -> LossTerms:
        anchors = Anchors(views, labels, keys)
        if anchors.images < self.least_images:
            raise ValueError(f"{type(self).__name__} needs {self.least_images} images or more, not {anchors.images}")
        with full_precision(anchors.z.device):
            return self.terms(anchors)

    def terms(self, anchors: Anchors) -> LossTerms:
        """Scalars in nats, from float32 or wider."""
        raise NotImplementedError

    def softmax(self) -> Softmax | None:
        """What the theory of thresholds needs to know; None for a loss of another form."""
        return None

    def update(self, *views: Tensor, labels: Tensor) -> None:
        """What to remember after a step on the views and labels of all processes; most losses remember nothing."""


def balance(alpha: float, attract: Tensor, repel: Tensor) -> LossTerms:
    """total = 2 (alpha A + (1 - alpha) R) of scalars A and R."""
    return LossTerms(2 * (alpha * attract + (1 - alpha) * repel), attract, repel)


def check_alpha(alpha: float | None) -> None:
    """Raise ``ValueError`` unless ``alpha`` is a number in [0, 1]."""
    if alpha is None or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the balance is a number in [0, 1]; alpha=0.5 is A + R")


def check_positive(**values: float) -> None:
    """Raise ``ValueError`` unless every value is positive and finite."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: give a positive number, such as 0.5")

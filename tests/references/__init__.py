"""The losses as their papers write them: sums over anchors in Python, float64, sharing nothing with ``scclr``.

``references/<name>.py`` belongs to ``conf/loss/<name>.yaml`` and defines ``terms(views, labels, **arguments)``. It
returns (A, R), of which the paper's loss is the sum. ``views`` are V tensors [B, P] with unit rows, ``labels`` are
[B], and ``arguments`` are those of the YAML file but alpha. A list ``VARIANTS`` of other arguments to test is optional.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]


def rows_and_images(views: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """All rows one after the other, and the image of each."""
    return [row for view in views for row in view], [i for view in views for i in range(len(view))]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0) / len(values)


def log_sum_exp(logits: list[Tensor]) -> Tensor:
    largest = max(logit.item() for logit in logits)
    return largest + torch.stack([(logit - largest).exp() for logit in logits]).sum().log()


def pairwise(
    views: list[Tensor], temperature: float, positive: Callable[..., bool], negative: Callable[..., bool]
) -> Terms:
    """Attraction to the mean of the rows k with ``positive(i, k)``, and repulsion from the log-sum-exp of the rows with
    ``negative(i, k)``, as means over rows i."""
    rows, _ = rows_and_images(views)
    attract, repel = [], []
    for i, z in enumerate(rows):
        attract.append(-mean([z @ other / temperature for k, other in enumerate(rows) if positive(i, k)]))
        repel.append(log_sum_exp([z @ other / temperature for k, other in enumerate(rows) if negative(i, k)]))
    return mean(attract), mean(repel)

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
    views: list[Tensor], temperature: float, positive: Callable[[int, int], bool], negative: Callable[[int, int], bool]
) -> Terms:
    """Attraction of each row to the mean of its positives, and repulsion from the log-sum-exp of its negatives.

    ``positive(i, k)`` and ``negative(i, k)`` say whether a row of image k is one of a row of image i.
    """
    rows, image = rows_and_images(views)
    attract, repel = [], []
    for a, z in enumerate(rows):
        logits = [(image[b], z @ other / temperature) for b, other in enumerate(rows) if b != a]
        attract.append(-mean([logit for k, logit in logits if positive(image[a], k)]))
        repel.append(log_sum_exp([logit for k, logit in logits if negative(image[a], k)]))
    return mean(attract), mean(repel)

"""NT-Xent's terms, and closed forms of the balanced loss of two views."""

import math

import torch
from torch import Tensor

from references import ntxent


def terms(views, labels, *, temperature, similarity, rescale):
    assert (similarity, rescale) == ("cosine", "none")
    return ntxent.terms(views, labels, temperature=temperature)


def cross_entropy(views: list[Tensor], temperature: float) -> Tensor:
    """NT-Xent as a classification: logits without the diagonal, the positive as the target."""
    z = torch.cat(views)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(views[0])))


def gradient(views: list[Tensor], temperature: float, alpha: float) -> Tensor:
    """d total / d z [2B, P], where s_ik = <z_i, z_k>."""
    z = torch.cat(views)
    by_similarity = similarity_gradient(z @ z.T, temperature, alpha)
    return (by_similarity + by_similarity.T) @ z


def similarity_gradient(s: Tensor, temperature: float, alpha: float) -> Tensor:
    """d total / d s = (2 / tau) [(1 - alpha) p_ik - alpha 1(k = positive)] / 2B, [2B, 2B]."""
    n = len(s)
    p = (s / temperature).fill_diagonal_(-math.inf).softmax(1)
    positive = torch.eye(n, dtype=s.dtype).roll(n // 2, 0)
    return 2 / temperature * ((1 - alpha) * p - alpha * positive) / n


def minimum(images: int, alpha: float, temperature: float) -> tuple[float, float]:
    """The least loss over all unit embeddings, and the similarity of positives there.

    The loss is convex in the Gram matrix and symmetric under permutations of images and views. So the minimizer has one
    similarity a of positives and one other, b = -(1 + a) / D with D = 2B - 2.
    """
    d = 2 * images - 2
    ratio = (1 - alpha) / alpha
    a = 1.0
    if ratio > 1:
        a = min(1.0, (d * temperature * math.log((d + ratio) / (ratio - 1)) - 1) / (d + 1))
    b = -(1 + a) / d
    repel = math.log(math.exp(a / temperature) + d * math.exp(b / temperature))
    return 2 * (-alpha * a / temperature + (1 - alpha) * repel), a

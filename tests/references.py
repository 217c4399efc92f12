"""The losses as their papers write them: sums over anchors in Python, float64, sharing nothing with ``scclr``.

``views`` are V tensors [B, P] with unit rows. Each function returns (A, R); the literature's loss is A + R.
"""

import itertools
import math

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]


def anchors(views: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """All rows one after the other, and the image of each."""
    return [row for view in views for row in view], [i for view in views for i in range(len(view))]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0) / len(values)


def log_sum_exp(logits: list[Tensor]) -> Tensor:
    top = max(logit.item() for logit in logits)
    return top + torch.stack([(logit - top).exp() for logit in logits]).sum().log()


def pairwise(views, tau, positive, negative) -> Terms:
    """Attraction to the mean of ``positive(i, k)``, repulsion from the log-sum-exp of ``negative(i, k)``, over rows."""
    rows, _ = anchors(views)
    attract, repel = [], []
    for i, z in enumerate(rows):
        attract.append(-mean([z @ other / tau for k, other in enumerate(rows) if positive(i, k)]))
        repel.append(log_sum_exp([z @ other / tau for k, other in enumerate(rows) if negative(i, k)]))
    return mean(attract), mean(repel)


def ntxent(views, tau) -> Terms:
    """Chen et al. 2020, eq. 1."""
    _, image = anchors(views)
    return pairwise(views, tau, lambda i, k: i != k and image[i] == image[k], lambda i, k: i != k)


def decoupled(views, tau) -> Terms:
    """Yeh et al. 2022: the denominator without the anchor's own image."""
    _, image = anchors(views)
    return pairwise(views, tau, lambda i, k: i != k and image[i] == image[k], lambda i, k: image[i] != image[k])


def nscl(views, tau, labels) -> Terms:
    """Luthra et al. 2025: the denominator without the anchor's class."""
    _, image = anchors(views)
    other_class = lambda i, k: labels[image[i]] != labels[image[k]]  # noqa: E731
    return pairwise(views, tau, lambda i, k: i != k and image[i] == image[k], other_class)


def supcon(views, tau, labels) -> Terms:
    """Khosla et al. 2020, eq. 2, L_out."""
    _, image = anchors(views)
    same_class = lambda i, k: i != k and labels[image[i]] == labels[image[k]]  # noqa: E731
    return pairwise(views, tau, same_class, lambda i, k: i != k)


def infonce(views, tau) -> Terms:
    """van den Oord et al. 2018, eq. 4, for every ordered pair of views."""
    attract, repel = [], []
    for v, w in itertools.permutations(range(len(views)), 2):
        for i, z in enumerate(views[v]):
            attract.append(-z @ views[w][i] / tau)
            repel.append(log_sum_exp([z @ other / tau for other in views[w]]))
    return mean(attract), mean(repel)


def hard_negative(views, tau, class_prior, hardness) -> Terms:
    """Robinson et al. 2021, with exponentials as written; ``hardness = 0`` is Chuang et al. 2020."""
    rows, image = anchors(views)
    attract, repel = [], []
    for i, z in enumerate(rows):
        negatives = torch.stack([(z @ rows[k] / tau).exp() for k in range(len(rows)) if image[k] != image[i]])
        weights = negatives**hardness / (negatives**hardness).mean()
        for p in range(len(rows)):
            if p != i and image[p] == image[i]:
                positive = (z @ rows[p] / tau).exp()
                estimate = ((weights * negatives).mean() - class_prior * positive) / (1 - class_prior)
                g = estimate.clamp(min=math.exp(-1 / tau))
                attract.append(-positive.log())
                repel.append((positive + len(negatives) * g).log())
    return mean(attract), mean(repel)


def debiased(views, tau, class_prior) -> Terms:
    """Chuang et al. 2020, with one positive."""
    return hard_negative(views, tau, class_prior, 0.0)


def prototype(views, tau, labels, repulsion) -> Terms:
    """Lee 2025: -<z, mu_y> and the strongest, or the log-sum-exp, of the other classes' <z, mu>; all over tau."""
    rows, image = anchors(views)
    label = [int(labels[i]) for i in image]
    mu = {c: mean([z for z, y in zip(rows, label, strict=True) if y == c]) for c in set(label)}
    attract, repel = [], []
    for z, y in zip(rows, label, strict=True):
        others = [z @ mu[c] / tau for c in mu if c != y]
        attract.append(-z @ mu[y] / tau)
        repel.append(torch.stack(others).max() if repulsion == "max" else log_sum_exp(others))
    return mean(attract), mean(repel)


def align_uniform(views, t) -> Terms:
    """Wang & Isola 2020, eqs. 5 and 6 with distances computed as distances."""
    pairs = itertools.permutations(range(len(views)), 2)
    attract = [(views[v] - views[w]).square().sum(1).mean() for v, w in pairs]
    repel = []
    for view in views:
        others = [
            (-t * (view[i] - view[k]).square().sum()).exp() for i, k in itertools.permutations(range(len(view)), 2)
        ]
        repel.append(mean(others).log())
    return mean(attract), mean(repel)


def spectral(views, mu) -> Terms:
    """HaoChen et al. 2021, for f = sqrt(mu) z: -2 E f(x) f(x+) and E (f(x) f(x'))^2."""
    rows, image = anchors([math.sqrt(mu) * view for view in views])
    index = range(len(rows))
    attract = [-2 * rows[i] @ rows[k] for i in index for k in index if i != k and image[i] == image[k]]
    repel = [(rows[i] @ rows[k]) ** 2 for i in index for k in index if image[i] != image[k]]
    return mean(attract), mean(repel)


def sigmoid(views, scale, bias) -> Terms:
    """Zhai et al. 2023, algorithm 1: -log sigmoid(label * logit), summed over pairs, over the number of images."""
    attract, repel = [], []
    for v, w in itertools.combinations(range(len(views)), 2):
        images = range(len(views[v]))
        losses = {
            (i, k): -torch.nn.functional.logsigmoid((1 if i == k else -1) * (scale * views[v][i] @ views[w][k] + bias))
            for i in images
            for k in images
        }
        attract.append(torch.stack([losses[i, i] for i in images]).sum() / len(images))
        repel.append(
            torch.stack([x for (i, k), x in losses.items() if i != k] or [attract[-1] * 0]).sum() / len(images)
        )
    return mean(attract), mean(repel)


def cross_entropy(views: list[Tensor], tau: float) -> Tensor:
    """NT-Xent of two views as a classification: logits without the diagonal, the positive as the target."""
    z = torch.cat(views)
    logits = (z @ z.T / tau).fill_diagonal_(-math.inf)
    target = torch.arange(len(z)).roll(len(views[0]))
    return torch.nn.functional.cross_entropy(logits, target)


def balanced_gradient(views: list[Tensor], tau: float, alpha: float) -> Tensor:
    """d total / d z [2B, P] of the balanced loss of two views, in closed form.

    d total / d s = (2 / tau) [(1 - alpha) p_ik - alpha 1(k = positive)] / 2B, and s_ik = <z_i, z_k>.
    """
    z = torch.cat(views)
    by_similarity = balanced_similarity_gradient(z @ z.T, tau, alpha)
    return (by_similarity + by_similarity.T) @ z


def balanced_similarity_gradient(s: Tensor, tau: float, alpha: float) -> Tensor:
    """d total / d s [2B, 2B] in closed form."""
    n = len(s)
    p = (s / tau).fill_diagonal_(-math.inf).softmax(1)
    positive = torch.eye(n, dtype=s.dtype).roll(n // 2, 0)
    return 2 / tau * ((1 - alpha) * p - alpha * positive) / n


def minimum(images: int, alpha: float, tau: float) -> tuple[float, float]:
    """(least loss, positive similarity there) of the balanced loss over all unit embeddings, two views.

    Convex in the Gram matrix and symmetric under image and view permutations, so the minimiser has one positive
    similarity a and one other, b = -(1 + a) / D with D = 2B - 2.
    """
    d = 2 * images - 2
    ratio = (1 - alpha) / alpha
    a = 1.0
    if ratio > 1:
        a = min(1.0, (d * tau * math.log((d + ratio) / (ratio - 1)) - 1) / (d + 1))
    b = -(1 + a) / d
    return 2 * (-alpha * a / tau + (1 - alpha) * math.log(math.exp(a / tau) + d * math.exp(b / tau))), a

"""Luthra et al. 2025: the denominator without the anchor's class, and, in their code, with the positive."""

import torch

from references import log_sum_exp, mean, pairwise, rows_and_images

VARIANTS = [{"positive_in_denominator": True}]


def terms(views, labels, *, temperature, positive_in_denominator):
    attract, repel = pairwise(views, temperature, lambda i, k: i == k, lambda i, k: labels[i] != labels[k])
    if positive_in_denominator:
        rows, image = rows_and_images(views)
        values = []
        for a, z in enumerate(rows):
            negatives = [z @ rows[b] / temperature for b, k in enumerate(image) if labels[k] != labels[image[a]]]
            positives = [z @ rows[b] / temperature for b, k in enumerate(image) if k == image[a] and b != a]
            values += [log_sum_exp([positive, *negatives]) for positive in positives]
        repel = mean(values)
    return attract, repel


def equation(views: list[torch.Tensor], labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """-1 / (V^2 B) sum_{v,w} sum_i log(exp(<z_vi, z_wi> / tau) / sum_u sum_{k: y_k != y_i} exp(<z_vi, z_uk> / tau))."""
    parts = []
    for one in views:
        for other in views:
            for i, z in enumerate(one):
                foreign = [
                    z @ view[k] / temperature for view in views for k in range(len(view)) if labels[k] != labels[i]
                ]
                parts.append(log_sum_exp(foreign) - z @ other[i] / temperature)
    return mean(parts)


def code(views: list[torch.Tensor], labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Their NegSupConLoss of two views: cross-entropy of the positive before all views of other classes."""
    z, y = torch.cat(views), labels.repeat(2)
    s = z @ z.T / temperature
    positive = s.diagonal(len(labels)), s.diagonal(-len(labels))
    logits = torch.cat(
        [torch.cat(positive).unsqueeze(1), s.masked_fill(y.unsqueeze(0) == y.unsqueeze(1), -torch.inf)], 1
    )
    return torch.nn.functional.cross_entropy(logits, torch.zeros_like(y))

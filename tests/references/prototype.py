"""Lee 2025: -<z, mu_y>, and the maximum or the log-sum-exp of <z, mu_c> over other classes; all divided by tau."""

import torch

from references import log_sum_exp, mean, rows_and_images

VARIANTS = [{"repulsion": "logsumexp"}]


def terms(views, labels, *, temperature, repulsion):
    rows, image = rows_and_images(views)
    label = [int(labels[i]) for i in image]
    mu = {c: mean([z for z, y in zip(rows, label, strict=True) if y == c]) for c in set(label)}
    attract, repel = [], []
    for z, y in zip(rows, label, strict=True):
        others = [z @ mu[c] / temperature for c in mu if c != y]
        attract.append(-z @ mu[y] / temperature)
        repel.append(torch.stack(others).max() if repulsion == "max" else log_sum_exp(others))
    return mean(attract), mean(repel)

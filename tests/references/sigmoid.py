"""Zhai et al. 2023, algorithm 1: -log sigmoid(label * logit), summed over pairs and divided by the number of images."""

import itertools

from torch.nn.functional import logsigmoid

from references import mean

VARIANTS = [{"bias": -3.0}]


def terms(views, labels, *, scale, bias):
    attract, repel = [], []
    for one, other in itertools.combinations(views, 2):
        images = range(len(one))
        logits = {(i, k): scale * one[i] @ other[k] + bias for i in images for k in images}
        attract.append(mean([-logsigmoid(logits[i, i]) for i in images]))
        repel.append(sum(-logsigmoid(-logit) for (i, k), logit in logits.items() if i != k) / len(one))
    return mean(attract), mean(repel)

"""Robinson et al. 2021, with exponentials as written."""

import math

import torch

from references import mean, rows_and_images

VARIANTS = [{"temperature": 0.5, "class_prior": 0.1, "hardness": 0.7}]


def terms(views, labels, *, temperature, class_prior, hardness):
    rows, image = rows_and_images(views)
    attract, repel = [], []
    for i, z in enumerate(rows):
        negatives = torch.stack([(z @ rows[k] / temperature).exp() for k in range(len(rows)) if image[k] != image[i]])
        weights = negatives**hardness / (negatives**hardness).mean()
        for p in range(len(rows)):
            if p != i and image[p] == image[i]:
                positive = (z @ rows[p] / temperature).exp()
                estimate = ((weights * negatives).mean() - class_prior * positive) / (1 - class_prior)
                g = estimate.clamp(min=math.exp(-1 / temperature))
                attract.append(-positive.log())
                repel.append((positive + len(negatives) * g).log())
    return mean(attract), mean(repel)

"""HaoChen et al. 2021, for f = sqrt(mu) z: -2 E f(x) f(x+) and E (f(x) f(x'))^2."""

import math

from references import mean, rows_and_images

VARIANTS = [{"mu": 3.0}]


def terms(views, labels, *, mu):
    rows, image = rows_and_images([math.sqrt(mu) * view for view in views])
    index = range(len(rows))
    attract = [-2 * rows[i] @ rows[k] for i in index for k in index if i != k and image[i] == image[k]]
    repel = [(rows[i] @ rows[k]) ** 2 for i in index for k in index if image[i] != image[k]]
    return mean(attract), mean(repel)

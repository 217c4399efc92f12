"""Chen et al. 2020, eq. 1."""

from references import pairwise


def terms(views, labels, *, temperature):
    return pairwise(views, temperature, lambda i, k: i == k, lambda i, k: True)

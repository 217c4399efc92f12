"""Yeh et al. 2022: the denominator without the anchor's own image."""

from references import pairwise


def terms(views, labels, *, temperature):
    return pairwise(views, temperature, lambda i, k: i == k, lambda i, k: i != k)

"""Luthra et al. 2025: the denominator without the anchor's class."""

from references import pairwise


def terms(views, labels, *, temperature):
    return pairwise(views, temperature, lambda i, k: i == k, lambda i, k: labels[i] != labels[k])

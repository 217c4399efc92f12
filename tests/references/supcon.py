"""Khosla et al. 2020, eq. 2, L_out."""

from references import pairwise


def terms(views, labels, *, temperature):
    return pairwise(views, temperature, lambda i, k: labels[i] == labels[k], lambda i, k: True)

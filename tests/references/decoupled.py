"""Yeh et al. 2022: the denominator without the anchor's own image."""

from references import pairwise, rows_and_images


def terms(views, labels, *, temperature):
    _, image = rows_and_images(views)
    return pairwise(views, temperature, lambda i, k: i != k and image[i] == image[k], lambda i, k: image[i] != image[k])

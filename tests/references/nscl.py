"""Luthra et al. 2025: the denominator without the anchor's class."""

from references import pairwise, rows_and_images


def terms(views, labels, *, temperature):
    _, image = rows_and_images(views)
    return pairwise(
        views,
        temperature,
        lambda i, k: i != k and image[i] == image[k],
        lambda i, k: labels[image[i]] != labels[image[k]],
    )

"""Chen et al. 2020, eq. 1."""

from references import pairwise, rows_and_images


def terms(views, labels, *, temperature):
    _, image = rows_and_images(views)
    return pairwise(views, temperature, lambda i, k: i != k and image[i] == image[k], lambda i, k: i != k)

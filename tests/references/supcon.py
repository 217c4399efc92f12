"""Khosla et al. 2020, eq. 2, L_out."""

from references import pairwise, rows_and_images


def terms(views, labels, *, temperature):
    _, image = rows_and_images(views)
    return pairwise(
        views, temperature, lambda i, k: i != k and labels[image[i]] == labels[image[k]], lambda i, k: i != k
    )

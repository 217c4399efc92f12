"""Wang & Isola 2020, eqs. 5 and 6, with distances computed as distances."""

import itertools

from references import mean


def terms(views, labels, *, t):
    attract = [(a - b).square().sum(1).mean() for a, b in itertools.permutations(views, 2)]
    repel = []
    for view in views:
        pairs = itertools.permutations(view, 2)
        repel.append(mean([(-t * (a - b).square().sum()).exp() for a, b in pairs]).log())
    return mean(attract), mean(repel)

"""van den Oord et al. 2018, eq. 4, for every ordered pair of views."""

import itertools

from references import log_sum_exp, mean


def terms(views, labels, *, temperature):
    attract, repel = [], []
    for v, w in itertools.permutations(range(len(views)), 2):
        for i, z in enumerate(views[v]):
            attract.append(-z @ views[w][i] / temperature)
            repel.append(log_sum_exp([z @ other / temperature for other in views[w]]))
    return mean(attract), mean(repel)

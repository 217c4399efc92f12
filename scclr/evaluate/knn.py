"""The weighted k-nearest-neighbour classifier of Wu et al. (2018).

Dimensions: N images with known labels, Q queries, D features, W processes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.run import distributed

QUERIES = 1024  # of each process that are compared at once, at most
COSINES = 2**26  # numbers; as many cosines are in memory at once


@torch.no_grad()
def knn_predict(
    bank: Sequence[tuple[Tensor, Tensor]], queries: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """The class of each query, int64 [Q], for which its k nearest images by cosine vote.

    A vote has the weight exp(cosine / temperature) (Wu et al. 2018, sec. 3.4). Weights are computed relative to the
    nearest image's, so no temperature makes them overflow. Each process holds a part of the bank and of the queries:
    every query visits every part, and the nearest of all parts vote.

    Args:
        bank: pairs of features [N, D] and labels int64 [N].
    """
    inverse = [x.norm(dim=1).clamp_min_(1e-12).reciprocal_() for x, _ in bank]
    longest = max([1, *(len(x) for x, _ in bank)])
    size = max(1, min(QUERIES, COSINES // longest // distributed.world_size()))
    own, most, size = len(queries), *(distributed.all_reduce_max(n) for n in (len(queries), size))
    predicted = []
    for start in range(0, most, size):
        part = queries[start : start + size]
        visiting = distributed.gather(F.pad(F.normalize(part, dim=1), (0, 0, 0, size - len(part))))  # [W size, D]
        found = [
            _nearest((visiting @ x.T).mul_(scale), labels, k) for (x, labels), scale in zip(bank, inverse, strict=True)
        ]
        cosine, voters = _merge(found, k)
        if distributed.world_size() > 1:
            here = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
            everywhere = (distributed.gather(values.unsqueeze(0))[:, here] for values in (cosine, voters))
            cosine, voters = _merge(list(zip(*everywhere, strict=True)), k)
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(cosine), classes, dtype=cosine.dtype, device=cosine.device)
        predicted.append(votes.scatter_add_(1, voters, weights).argmax(1)[: len(part)])
    return torch.cat([*predicted, queries.new_empty(0, dtype=torch.int64)])[:own]


def _nearest(cosine: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines [n, k] of [n, N], falling, and the labels there; without k images, -inf fills up."""
    best, index = cosine.topk(min(k, len(labels)), dim=1)
    missing = k - best.shape[1]
    return F.pad(best, (0, missing), value=-torch.inf), F.pad(labels[index], (0, missing))


def _merge(found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of several parts, and their labels."""
    if len(found) == 1:
        return found[0]
    cosines, labels = (torch.cat(values, 1) for values in zip(*found, strict=True))
    best, index = cosines.topk(k, dim=1)
    return best, labels.gather(1, index)

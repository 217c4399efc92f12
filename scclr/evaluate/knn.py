"""The weighted k-nearest-neighbour classifier of Wu et al. (2018).

Dimensions: N images with known labels, Q queries, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 1024  # that are compared with all images at once


@torch.no_grad()
def knn_predict(bank: Tensor, y_bank: Tensor, queries: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """The class of each query, int64 [Q], for which its k nearest images of ``bank`` [N, D] by cosine vote.

    A vote has the weight exp(cosine / temperature) (Wu et al. 2018, sec. 3.4). Weights are computed relative to the
    nearest image's, so no temperature makes them overflow.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    predicted = []
    for part in queries.split(QUERIES):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # [QUERIES, k], falling
        votes = torch.zeros(len(part), classes, dtype=bank.dtype, device=bank.device)
        votes.scatter_add_(1, y_bank[nearest], ((cosine - cosine[:, :1]) / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)

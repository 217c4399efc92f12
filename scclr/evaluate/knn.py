"""The weighted k-nearest-neighbour classifier of Wu et al. (2018).

Dimensions: N images with known labels, Q queries, D features, K classes, W processes.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.evaluate.protocol import Features, Outcome, Part, Protocol, require_grid
from scclr.evaluate.scores import Tally
from scclr.run import distributed

QUERIES = 1024  # of each process that are compared at once, at most
COSINES = 2**26  # numbers; as many cosines are in memory at once


class Knn(Protocol):
    """The class for which the k nearest known images by cosine vote, with the weights exp(cosine / temperature).

    Of several values, those with the best accuracy on the validation split are chosen; of equally good ones the first,
    in the order in which they are given, ``k`` before ``temperature``. One pass over the cosines serves all of them.
    All images that may be learned from (``Features.known``) are then neighbours of the test images. A ``k`` beyond
    their number is cut; ``chosen`` says how many vote.

    Args:
        k: numbers of neighbours that vote.
        temperature: of the weights.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, k: list[int], temperature: list[float]) -> None:
        require_grid("k", k, 1, 10**6)
        require_grid("temperature", temperature, 1e-6, 1e6)
        self.rules = list(product(k, temperature))

    def __call__(self, features: Features) -> Outcome:
        splits, validation, best = features.splits, None, self.rules[0]
        if len(self.rules) > 1:
            tallies = tally([features.train], features.validation, features.classes, self.rules, len(splits.train))
            found = {rule: one.metrics(splits)["top1"] for rule, one in tallies.items()}
            best = max(found, key=lambda rule: found[rule])
            validation = found[best]
        images = len(splits.train) + (len(splits.validation) if splits.refit else 0)
        tested = tally(features.known, features.test, features.classes, [best], images)[best]
        chosen = {"k": min(best[0], images), "temperature": best[1]}
        return Outcome(tested.metrics(splits), validation, chosen, tested.confusion)


@torch.no_grad()
def tally(
    bank: Sequence[Part], queries: Part, classes: int, rules: Sequence[tuple[int, float]], images: int
) -> dict[tuple[int, float], Tally]:
    """The scores of every rule (k, temperature) on ``queries``. A class without votes has the score -inf.

    Args:
        images: those of the bank, over all processes.
    """
    x, y = queries
    tallies = {rule: Tally(classes, y.device) for rule in rules}
    done = 0
    for cosine, voters in neighbours(bank, x, min(images, max(k for k, _ in rules))):
        labels = y[done : done + len(voters)]
        for k, temperature in rules:
            share = votes(cosine[:, :k], voters[:, :k], classes, temperature)
            tallies[k, temperature].add(share.double().log_(), labels)  # float64 keeps different votes different
        done += len(voters)
    return tallies


@torch.no_grad()
def knn_predict(bank: Sequence[Part], queries: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """The class of each query, int64 [Q], for which its k nearest images vote. See ``votes`` and ``neighbours``."""
    found = [votes(*nearest, classes, temperature).argmax(1) for nearest in neighbours(bank, queries, k)]
    return torch.cat([*found, queries.new_empty(0, dtype=torch.int64)])


def votes(cosine: Tensor, voters: Tensor, classes: int, temperature: float) -> Tensor:
    """The votes [Q, K] of neighbours with the falling ``cosine`` [Q, k] and the labels ``voters`` [Q, k].

    A vote has the weight exp(cosine / temperature) (Wu et al. 2018, sec. 3.4). Weights are computed relative to the
    nearest image's, so no temperature makes them overflow.
    """
    weights = ((cosine - cosine[:, :1]) / temperature).exp()
    return weights.new_zeros(len(cosine), classes).scatter_add_(1, voters, weights)


def neighbours(bank: Sequence[Part], queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The k greatest cosines of each query [n, k], falling, and the labels there, for one block of queries at a time.

    Each process holds a part of the bank and of the queries: every query visits every part, and the nearest of all
    parts are found. Where there are fewer than k images, -inf fills up.

    Args:
        bank: pairs of features [N, D] and labels int64 [N].
    """
    inverse = [x.norm(dim=1).clamp_min_(1e-12).reciprocal_() for x, _ in bank]
    longest = max([1, *(len(x) for x, _ in bank)])
    size = max(1, min(QUERIES, COSINES // longest // distributed.world_size()))
    most, size = (distributed.all_reduce_max(n) for n in (len(queries), size))
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
        yield cosine[: len(part)], voters[: len(part)]


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

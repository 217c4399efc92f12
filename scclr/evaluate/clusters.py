"""k-means on features of unit length: whether the classes are there before any label is read.

Dimensions: N images, D features, K classes.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.evaluate.features import held
from scclr.evaluate.protocol import Features, Outcome, Protocol, require_number
from scclr.run import distributed


class Clusters(Protocol):
    """k-means with as many clusters as there are classes, by scikit-learn, compared with the classes of test images.

    Features are scaled to unit length, because contrastive losses compare directions. To standardize them would give
    directions in which nothing varies but noise as much weight as those that tell classes apart. Labels enter the
    comparison only, not the fit. ``nmi`` is the normalized mutual information, divided by the mean of the entropies,
    and ``ari`` the adjusted Rand index (Hubert & Arabie 1985).

    Args:
        n_init: fits from different k-means++ centres; that with the least sum of squares counts.
        images: at most this many known images are clustered, drawn at random.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, n_init: int, images: int) -> None:
        require_number("n_init", n_init, 1, 1000)
        require_number("images", images, 2, 10**9)
        self.n_init, self.images = n_init, images

    def __call__(self, features: Features) -> Outcome:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        (x, y), classes = features.test, features.classes
        draw = np.random.default_rng(features.seed)
        sample = sampled(features, self.images, draw).cpu().numpy()
        model = KMeans(classes, n_init=self.n_init, random_state=int(draw.integers(2**31)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different features than clusters: a collapse
            model.fit(sample)
        centres = torch.from_numpy(model.cluster_centers_).to(x.device)
        cluster = torch.cdist(F.normalize(x, dim=1), centres).argmin(1)
        counts = torch.bincount(y * classes + cluster, minlength=classes**2)  # of each class in each cluster
        pairs = torch.arange(classes**2).repeat_interleave(distributed.all_reduce_sum(counts).cpu())
        truth, found = (pairs // classes).numpy(), (pairs % classes).numpy()
        nmi, ari = normalized_mutual_info_score(truth, found), adjusted_rand_score(truth, found)
        return Outcome({"nmi": float(nmi), "ari": float(ari)})


def sampled(features: Features, images: int, draw: np.random.Generator) -> Tensor:
    """Unit features [n, D] of at most ``images`` images that may be learned from, the same in every process."""
    sets = [features.splits.train, features.splits.validation][: len(features.known)]
    rows = torch.from_numpy(draw.permutation(sum(map(len, sets)))[:images]).sort().values
    found, before = [], 0
    for (x, _), data in zip(features.known, sets, strict=True):
        inside = rows[(rows >= before) & (rows < before + len(data))] - before
        where, own = held(inside, len(data))
        part = x.new_zeros(len(inside), x.shape[1])
        part[where.to(x.device)] = F.normalize(x[own.to(x.device)], dim=1)
        found.append(distributed.all_reduce_sum(part))
        before += len(data)
    return torch.cat(found)

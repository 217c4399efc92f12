"""The nearest class centre of features of unit length: how far prototypes alone tell the classes apart.

Dimensions: N images, D features, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.evaluate.logreg import blocks
from scclr.evaluate.protocol import Features, Outcome, Part, Protocol
from scclr.evaluate.scores import Tally
from scclr.run import distributed


class NearestClassCentre(Protocol):
    """The class c with the least |f - mu_c|, where f = h / |h| and mu_c is the mean of f over the known images of c.

    The decision is that of neural collapse (Papyan et al. 2020, NC4). The centres of unit features are the prototypes
    of Lee (2025), which are not scaled to unit length themselves. Nothing is chosen. Distances are no probabilities,
    so there is no calibration error.
    """

    def __call__(self, features: Features) -> Outcome:
        centres = class_centres(features.known, features.classes)
        offset = centres.square().sum(1) / 2
        tally = Tally(features.classes, centres.device, probabilities=False)
        for x, y in blocks([features.test], sum(centres.shape)):
            scores = F.normalize(x, dim=1) @ centres.T - offset  # (1 - |f - mu|^2) / 2
            tally.add(scores.nan_to_num_(nan=-torch.inf), y)  # of a class without images
        return Outcome(tally.metrics(features.splits), confusion=tally.confusion)


def class_centres(parts: Sequence[Part], classes: int) -> Tensor:
    """The mean of unit features over the images of each class and of all processes, float64 [K, D]; NaN without any."""
    width = parts[0][0].shape[1]
    sums = torch.zeros(classes, width + 1, dtype=torch.float64, device=parts[0][0].device)
    for x, y in blocks(parts, width):
        sums.index_add_(0, y, F.pad(F.normalize(x, dim=1), (0, 1), value=1.0))
    distributed.all_reduce_sum(sums)
    return sums[:, :-1] / sums[:, -1:]

"""The metrics that all classifiers share, from counts that are added up block by block.

Dimensions: n images of a block, K classes.
"""

import math

import torch
from torch import Tensor

from scclr.datasets import Splits
from scclr.run import distributed

BINS = 15  # of the expected calibration error (Guo et al. 2017, sec. 4)
EDGE = 1e-6  # bins are open on the left; this is more than the rounding of float32 moves a confidence
TOP = 5


class Tally:
    """Counts on the test split. ``add`` takes the share of this process; ``metrics`` adds up all processes.

    Args:
        classes: K.
        probabilities: whether the softmax of the scores are the classifier's probabilities. If not, there is no
            calibration error.
    """

    def __init__(self, classes: int, device: torch.device, *, probabilities: bool = True) -> None:
        self.probabilities = probabilities
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # rows the true classes
        self.top = torch.zeros((), dtype=torch.int64, device=device)  # images with their class among the best five
        self.bins = torch.zeros(BINS, 2, dtype=torch.float64, device=device)  # sums of confidence and of correctness

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a block.

        Args:
            scores: [n, K], log-probabilities up to a constant of each image, if ``probabilities``; else any scores
                that rise with the preference. A class with the score -inf is never predicted.
            labels: int64 [n].
        """
        classes = len(self.confusion)
        predicted = scores.argmax(1)
        self.confusion += torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
        if classes > TOP:
            own = scores.gather(1, labels.unsqueeze(1))  # [n, 1]
            before = torch.arange(classes, device=labels.device) < labels.unsqueeze(1)  # of equals the first is better
            better = ((scores > own) | ((scores == own) & before)).sum(1)
            self.top += ((better < TOP) & (own.squeeze(1) > -math.inf)).sum()
        if self.probabilities:
            confidence = scores.double().log_softmax(1).amax(1).exp()
            column = (confidence * BINS - EDGE).ceil_().sub_(1).clamp_(0, BINS - 1).long()
            self.bins.index_add_(0, column, torch.stack([confidence, (predicted == labels).double()], 1))

    def metrics(self, splits: Splits) -> dict[str, float]:
        """The metrics of all images, as fractions in [0, 1]. Every process calls this, once.

        ``top1``: the share that is classified correctly. ``top5``, of more than five classes: the share whose class is
        among the five best scores. ``balanced``: the mean over classes of the share of each that is classified
        correctly, over those with test images. ``ece``, of probabilities: the expected calibration error, the mean of
        |accuracy - mean confidence| over 15 equal bins of confidence, weighted by their images (Guo et al. 2017, eq.
        3). If the training images are a long tail, ``top1/many``, ``top1/medium`` and ``top1/few`` are the means of
        the per-class accuracies over classes of that size (Liu et al. 2019, sec. 4).
        """
        for counts in (self.confusion, self.top, self.bins):
            distributed.all_reduce_sum(counts)
        images = int(self.confusion.sum())
        by_class = self.confusion.diagonal().double() / self.confusion.sum(1)  # NaN for a class without images
        found = {"top1": int(self.confusion.trace()) / images}
        if len(self.confusion) > TOP:
            found["top5"] = int(self.top) / images
        found["balanced"] = by_class.nanmean().item()
        if self.probabilities:
            found["ece"] = (self.bins[:, 0] - self.bins[:, 1]).abs().sum().item() / images
        groups = {f"top1/{group}": by_class[members].nanmean().item() for group, members in splits.groups.items()}
        return found | {name: value for name, value in groups.items() if not math.isnan(value)}

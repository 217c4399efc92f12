"""Quality of features without labels: RankMe, LiDAR and alpha-ReQ. Computation is in float64.

Dimensions: N images, q views of each, D features. Several processes hold a share of the images each; every one gets the
numbers of all.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scclr.augment import Augment
from scclr.config.errors import UserError
from scclr.datasets import ImageSet
from scclr.datasets.loader import with_view_size
from scclr.encoders.model import Model
from scclr.evaluate.features import by_image, chosen_rows, extract_layers, fresh_views, own_share
from scclr.run import distributed
from scclr.run.machine import decompose

IMAGES = 25_600  # Garrido et al. 2023, sec. 3: as many give an accurate estimate
CLASSES, VIEWS = 1000, 10  # images, each of which is a surrogate class of LiDAR, and views of each
EPSILON = 1e-7  # Garrido et al. 2023, eq. 2, for float32; Thilak et al. 2024 take it over
DELTA = 1e-4  # added to the diagonal of Sigma_w (Thilak et al. 2024)
FIRST, LAST = 11, 100  # the eigenvalues that the power law is fitted to, counted from 1: those of the authors' reptrix
LEAST = 10  # of them; a slope over fewer says little
ROWS = 8192  # of features that are in float64 at once
AT_ONCE = 128  # surrogate classes whose views are in memory at once
SPECTRUM = 256  # singular values of a layer that are kept, at most


class Quality(NamedTuple):
    """What ``measure_quality`` finds."""

    metrics: dict[str, float]  # such as ``quality/h/rankme``; what is not finite is left out
    spectrum: dict[str, list[float]]  # the largest singular values of each layer, divided by the sum of all; or none


def measure_quality(
    model: Model, data: ImageSet, augment: Augment, batch_size: int, *, seed: int, layers: Sequence[str] = ("h", "z")
) -> Quality:
    """``quality/h/rankme``, ``quality/h/alpha_req``, ``quality/h/lidar``, and so on for ``layers``. No label is read.

    RankMe and alpha-ReQ are of un-augmented images, at most 25,600. LiDAR is of ten fresh views of the first 1,000 of
    these under ``augment``. It is left out where the views cannot be made, since ``augment`` rotates images that are
    read from files. z has unit rows, as the loss sees it. The model is in eval mode meanwhile, and no random state
    changes.

    Args:
        data: what the model was trained on, of which ``seed`` draws the images.
    """
    chosen = data[chosen_rows(len(data), seed, IMAGES).to(data.labels.device)]
    features = extract_layers(model, own_share(chosen), batch_size, layers)
    metrics: dict[str, Tensor] = {}
    spectrum = {}
    for layer in layers:
        singular, variances = spectra(features[layer])
        metrics |= {f"quality/{layer}/rankme": rankme(singular), f"quality/{layer}/alpha_req": alpha_req(variances)}
        shares = singular / singular.sum()  # NaN where all features are 0, or some overflow
        spectrum[layer] = shares[:SPECTRUM].tolist() if bool(shares.isfinite().all()) else []
    try:
        augment = with_view_size(augment, chosen.images)
    except UserError:  # image files are cut while they are read, and a rotation comes before the cut
        sums = {}
    else:
        sums = _scatter(model, chosen[slice(0, CLASSES)], augment, seed, layers)
    metrics |= {f"quality/{layer}/lidar": lidar(*sums[layer].covariances()) for layer in sums}
    values = {name: value.item() for name, value in metrics.items()}
    return Quality({name: value for name, value in values.items() if math.isfinite(value)}, spectrum)


@torch.no_grad()
def _scatter(
    model: Model, data: ImageSet, augment: Augment, seed: int, layers: Sequence[str]
) -> dict[str, "ViewScatter"]:
    """The sums over ``VIEWS`` views of each image. The processes take the parts of ``data`` in turn."""
    sums = {layer: ViewScatter(model.width(layer), data.labels.device) for layer in layers}
    training = model.training
    model.eval()
    for number in range(distributed.rank(), -(-len(data) // AT_ONCE), distributed.world_size()):
        part = data[slice(number * AT_ONCE, (number + 1) * AT_ONCE)]
        outputs = [model(x) for x in fresh_views(part, augment, VIEWS, model.channels, seed=seed, part=number)]
        for layer, rows in zip(("h", "z"), zip(*outputs, strict=True), strict=True):
            if layer in sums:
                sums[layer].add(by_image(rows, len(part), VIEWS))
    model.train(training)
    return sums


def spectra(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of features [N, D] of all processes: the singular values, min(N, D), and the eigenvalues of the covariance, D.

    Both fall. They come from the D x D matrix of second moments, and what is not above its rounding is 0: singular
    values below 1e-8 of the largest.
    """
    width = x.shape[1]
    sums = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        ones = torch.cat([rows.double(), torch.ones_like(rows[:, :1], dtype=torch.float64)], 1)
        sums.addmm_(ones.T, ones)
    sums = distributed.all_reduce_sum(sums)
    images, second, mean = sums[-1, -1], sums[:-1, :-1], sums[:-1, -1] / sums[-1, -1]
    singular = eigenvalues(second).sqrt()[: int(images.item())]
    return singular, eigenvalues(second / images - mean.outer(mean))


def eigenvalues(x: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix without negative ones, falling. What is not above rounding is 0."""
    found = decompose(torch.linalg.eigvalsh, x).flip(0)
    return torch.where(found > len(x) * torch.finfo(x.dtype).eps * found[0], found, 0)


def entropy_rank(values: Tensor, epsilon: float = 0.0) -> Tensor:
    """exp of the entropy of ``values / sum(values) + epsilon`` (Roy & Vetterli 2007, with epsilon = 0)."""
    return torch.special.entr(values / values.sum() + epsilon).sum().exp()


def rankme(singular: Tensor) -> Tensor:
    """RankMe, about 1 to min(N, D), from the singular values of features that are not centred (Garrido et al. 2023,
    eq. 1 and 2)."""
    return entropy_rank(singular, EPSILON)


def alpha_req(variances: Tensor) -> Tensor:
    """alpha of the power law ``n^-alpha`` that the eigenvalues of the covariance follow (Agrawal et al. 2022).

    As in the authors' code (reptrix, after Stringer et al. 2019) it is the slope of a line through the logarithms of
    the eigenvalues 11 to 100, the n-th with the weight 1 / n. Eigenvalues that are lost to rounding are left out. NaN
    if fewer than ten are left.

    Args:
        variances: falling.
    """
    y = variances[FIRST - 1 : LAST]
    y = y[y > 0].log()
    if len(y) < LEAST:
        return y.new_tensor(math.nan)
    n = torch.arange(FIRST, FIRST + len(y), dtype=y.dtype, device=y.device)
    x, weight = -n.log(), 1 / n
    x, y = (values - (weight * values).sum() / weight.sum() for values in (x, y))
    return (weight * x * y).sum() / (weight * x.square()).sum()


class ViewScatter:
    """Sums over images and their views, from which the covariances of LiDAR follow."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.within, self.between = torch.zeros(2, width, width, dtype=torch.float64, device=device).unbind()
        self.total, self.counts = (torch.zeros(n, dtype=torch.float64, device=device) for n in (width, 2))

    def add(self, x: Tensor) -> None:
        """Views [n, q, D] of more images."""
        x = x.double()
        mean = x.mean(1)
        rest = (x - mean.unsqueeze(1)).flatten(0, 1)
        self.within.addmm_(rest.T, rest)
        self.between.addmm_(mean.T, mean)
        self.total += mean.sum(0)
        self.counts += torch.tensor([len(mean), len(rest)], device=x.device)

    def covariances(self) -> tuple[Tensor, Tensor]:
        """(Sigma_b, Sigma_w), [D, D] each, over the images of all processes. Every process must call this, once."""
        within, between, total, counts = map(
            distributed.all_reduce_sum, (self.within, self.between, self.total, self.counts)
        )
        images, views = counts
        mean = total / images
        return between / images - mean.outer(mean), within / views


def lidar(between: Tensor, within: Tensor) -> Tensor:
    """LiDAR, about 1 to D: the effective rank of ``Sigma_w^-1/2 Sigma_b Sigma_w^-1/2`` (Thilak et al. 2024).

    The images are the classes of a linear discriminant analysis. The eigenvalues p of this matrix, divided by their
    sum, give exp of the entropy of p + epsilon.

    Args:
        between: Sigma_b [D, D], the covariance of the means over the views of an image.
        within: Sigma_w [D, D], the mean covariance of the views of an image; delta is added to its diagonal.
    """
    root = torch.linalg.cholesky(within + DELTA * torch.eye(len(within), dtype=within.dtype, device=within.device))
    half = torch.linalg.solve_triangular(root, between, upper=False)
    return entropy_rank(eigenvalues(torch.linalg.solve_triangular(root, half.T, upper=False)), EPSILON)

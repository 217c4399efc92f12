"""A forecast before the first training step: at which alpha embeddings will collapse or positives will separate."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scclr.augment import Augment
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.evaluate.features import by_image, fresh_views
from scclr.losses import LogSumExpForm
from scclr.theory.thresholds import augmentation_correlations, edges

FORECAST_IMAGES, FORECAST_VIEWS = 1024, 8
AT_ONCE = 256  # images, since the batch of a training does not fit a GPU in float32
PIXELS = 8  # the side to which views are averaged down


@dataclass(frozen=True)
class Forecast:
    """The range of alpha in which embeddings neither collapse nor separate positives."""

    r_max: float  # largest canonical correlation between views, of pixels and the untrained encoder's h
    alpha_col: float
    alpha_mis: float  # 0 for the decoupled loss, which never separates positives
    alpha_mis_exact: bool  # False where the embedding has so few dimensions that the onset may lie lower

    def warnings(self, alphas: list[float]) -> list[str]:
        """One line for each end of the range that one of ``alphas`` lies beyond."""
        lines = []
        if max(alphas) > self.alpha_col:
            lines.append(
                f"alpha={max(alphas):g} is above {self.alpha_col:.3f}: embeddings are forecast to collapse to a point "
                f"(r_max {self.r_max:.3f} before training); lower alpha, or weaken the augmentation to raise this limit"
            )
        if min(alphas) < self.alpha_mis:
            verb = "separates" if self.alpha_mis_exact else "may separate"
            lines.append(
                f"alpha={min(alphas):g} is below {self.alpha_mis:.3f}: at this temperature and batch size the best "
                f"embedding {verb} positives; raise alpha, or type loss=decoupled, which has no such limit"
            )
        return lines


@torch.no_grad()
def forecast_collapse(
    model: Model, data: ImageSet, augment: Augment, form: LogSumExpForm, *, batch: int, seed: int
) -> Forecast:
    """The forecast from eight views of the first 1,024 images, for a training with batches of ``batch``.

    No more than 256 images are in the encoder at once, so above that batch normalization uses statistics of 256 images
    and not those of a batch.

    The features are what a linear map can use at the start: the untrained h, and the pixels averaged down to 8 x 8. The
    model, its buffers and all random states stay as they are.
    """
    twin = copy.deepcopy(model).train()  # its running statistics change, not the model's
    parts, size = [], min(batch, AT_ONCE)
    for number in range(max(1, min(FORECAST_IMAGES, len(data)) // size)):
        part = data[slice(number * size, (number + 1) * size)]
        outputs = []  # h, z and pixels of one step's views at a time
        for x in fresh_views(part, augment, FORECAST_VIEWS, model.channels, seed=seed, part=number):
            outputs.append((*twin(x), F.adaptive_avg_pool2d(x, PIXELS).flatten(1)))
        h, z, pixels = zip(*outputs, strict=True)
        parts.append([by_image(x, len(part), FORECAST_VIEWS) for x in (h, pixels)])  # [b, 8, D] each
    features = [torch.cat(rows) for rows in zip(*parts, strict=True)]
    scaled = [x / x.std((0, 1)).mean().clamp(min=torch.finfo(x.dtype).tiny) for x in features]
    r_max = augmentation_correlations(torch.cat(scaled, 2))[0].item()
    found = edges(form, r_max=r_max, images=batch, views=len(augment.views), width=z[0].shape[1])
    return Forecast(r_max, found.alpha_col, found.alpha_mis, found.alpha_mis_exact)

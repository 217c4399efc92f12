"""What a balance will do, foreseen before the first step from the untrained encoder."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scclr.augment import Augment
from scclr.datasets import ImageSet
from scclr.loader import views
from scclr.losses import Softmax
from scclr.model import Model
from scclr.theory.stage import AFTER, in_channels
from scclr.theory.thresholds import augmentation_correlations, collapse_threshold, misalignment_onset

IMAGES, VIEWS, SIDE = 1024, 8, 8


@dataclass(frozen=True)
class Forecast:
    """The edges of alpha between which embeddings neither collapse nor keep positives apart."""

    r_max: float  # the largest canonical correlation between views, of pixels and the untrained encoder's h
    alpha_col: float
    alpha_mis: float  # 0 for the decoupled loss, which has no such onset

    def warnings(self, alphas: list[float]) -> list[str]:
        """A line for every edge that one of ``alphas`` is beyond."""
        lines = []
        if max(alphas) > self.alpha_col:
            lines.append(
                f"alpha={max(alphas):g} is above {self.alpha_col:.3f}: embeddings are forecast to collapse to a point "
                f"(r_max {self.r_max:.3f} before training); a weaker augmentation raises this edge"
            )
        if min(alphas) < self.alpha_mis:
            lines.append(
                f"alpha={min(alphas):g} is below {self.alpha_mis:.3f}: at this temperature and batch size the best "
                "embedding keeps positives apart; loss=decoupled has no such edge"
            )
        return lines


@torch.no_grad()
def forecast(model: Model, data: ImageSet, augment: Augment, softmax: Softmax, *, batch: int, seed: int) -> Forecast:
    """From eight views of the first 1,024 images, in batches with their own statistics, as in training.

    The features are those that a linear map finds at the start: the untrained h, and the pixels, averaged down to
    8 x 8. The model, its buffers and all random states stay as they are.
    """
    twin = copy.deepcopy(model).train()  # its running statistics move, not the model's
    calls, parts = -(-VIEWS // len(augment.views)), []
    for number in range(max(1, min(IMAGES, len(data)) // batch)):
        part = data[slice(number * batch, (number + 1) * batch)]
        steps = (AFTER + number * calls + call for call in range(calls))
        seen = [in_channels(views(part, augment, seed=seed, step=step), model.channels) for step in steps]
        blocks = torch.cat([twin(x)[0].float() for x in seen]), F.adaptive_avg_pool2d(torch.cat(seen), SIDE).flatten(1)
        parts.append([x.unflatten(0, (-1, len(part)))[:VIEWS] for x in blocks])  # [M, b, D]
    features = [torch.cat(block, 1) for block in zip(*parts, strict=True)]
    scaled = [x / x.std((0, 1)).mean().clamp(min=torch.finfo(x.dtype).tiny) for x in features]
    r_max = augmentation_correlations(*torch.cat(scaled, 2))[0].item()
    onset = 0.0 if softmax.decoupled else misalignment_onset(batch, float(softmax.temperature))
    return Forecast(r_max, collapse_threshold(r_max), onset)

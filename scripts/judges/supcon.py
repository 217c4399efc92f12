"""SupCon minus SimCLR on the embeddings of a checkpoint, where only other images of the class are SupCon's positives.

Dimensions: n images, M = 2 views of each, P embedding dimensions.
"""

import json
import sys
from dataclasses import replace
from statistics import fmean, stdev

import torch
from torch import Tensor

import scclr
from judges.verdict import NORM, Runs
from scclr.components import make_augment, make_dataset, pick_device
from scclr.config.errors import UserError
from scclr.datasets import ImageSet
from scclr.evaluate.features import chosen_rows
from scclr.losses import BalancedLoss, SupConLoss
from scclr.report.runs import Run
from scclr.theory.embed import embed
from scclr.theory.moments import COLLAPSED

DIFFERENCE = "supcon/difference"
GROUPS = 20  # of the images, whose spread is the standard error


def with_differences(runs: Runs) -> list[Run]:
    """The runs with ``supcon/difference`` and its standard error; without them where all embeddings are one point, the
    loss is not ``balanced``, or there is no checkpoint."""
    known: dict[str, ImageSet] = {}
    found = []
    for run in runs:
        balanced = run.settings.get("loss") == "balanced" and run.settings.get("loss.similarity") == "cosine"
        if not balanced or run.numbers[NORM] > COLLAPSED or not (run.directory / "last.pt").exists():
            found.append(run)
            continue
        try:
            value, error = of_run(run, known)
        except UserError as why:
            print(f"left out of E7: {run.directory}: {why}", file=sys.stderr)
            found.append(run)
        else:
            found.append(replace(run, numbers={**run.numbers, DIFFERENCE: value, f"{DIFFERENCE}/se": error}))
    return found


def of_run(run: Run, known: dict[str, ImageSet]) -> tuple[float, float]:
    """``supcon_difference`` of the trained model on fresh views of training images.

    Args:
        known: training images by dataset, which this adds to.

    Raises:
        UserError: the run cannot be loaded, or a class has too few images.
    """
    loaded = scclr.load(run.directory)
    config, device = loaded.config, pick_device("auto")
    key = json.dumps(config.dataset, sort_keys=True)
    if key not in known:
        known[key] = make_dataset(config).load().train
    rows = chosen_rows(len(known[key]), config.seed, config.theory.images)
    data = known[key][rows].to(device)
    seed = config.seed + 1  # other views than those of theory.json
    _, z = embed(loaded.model.to(device), data, make_augment(config), 2, config.probe.batch_size, seed=seed)
    return supcon_difference(z, data.labels, alpha=config.last_alpha, temperature=config.loss["temperature"])


def supcon_difference(z: Tensor, labels: Tensor, *, alpha: float, temperature: float) -> tuple[float, float]:
    """The mean of SupCon minus SimCLR over z [n, 2, P] with int64 labels [n], and its standard error.

    Both losses repel alike, so batches of one class serve: with k images SupCon's 2k - 1 positives are the other view
    of the image, as in SimCLR, and 2k - 2 views of other images. So the difference for the latter alone is (2k - 1) /
    (2k - 2) times that of the losses. Classes are weighted by their shares.

    Raises:
        UserError: a class has fewer than four images.
    """
    counts = labels.bincount()
    counts = counts[counts > 0]
    groups = min(GROUPS, int(counts.min()) // 2)
    if groups < 2:
        raise UserError(f"a class has {int(counts.min())} images; give four or more of each")
    losses = [loss(alpha=alpha, temperature=temperature) for loss in (SupConLoss, BalancedLoss)]
    values = [0.0] * groups
    for label, count in zip(labels.unique().tolist(), counts.tolist(), strict=True):
        for group, part in enumerate(z[labels == label].double().tensor_split(groups)):
            k, same = len(part), torch.zeros(len(part), dtype=torch.int64, device=z.device)
            supcon, simclr = (loss(*part.unbind(1), labels=same).total.item() for loss in losses)
            values[group] += count / len(z) * (supcon - simclr) * (2 * k - 1) / (2 * k - 2)
    return fmean(values), stdev(values) / groups**0.5

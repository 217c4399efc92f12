"""The figures of one run that need its encoder and its images: test images in two dimensions, and their neighbours.

Dimensions: N test images, S of them in a strip, D features, C channels, H x W pixels.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scclr.report import drawing
from scclr.report.drawing import INK, Picture

if TYPE_CHECKING:
    from torch import Tensor

IMAGES, CANDIDATES = 2000, 5000  # test and training images at most, evenly spaced
STRIPS, NEAREST = 8, 5  # test images that have a strip; neighbours in it
UMAP_NEIGHBOURS = 15  # its default
NUMBERED = 20  # classes, up to which they are named in the plot
LONGEST = 12  # characters of a class's name
GAP, LINE = 0.35, 1.36  # between a test image and its neighbours, and from strip to strip; images have sides of 1


class Seen(NamedTuple):
    """What the encoder of a run makes of test images.

    Args:
        h: float64 [N, D].
        labels, nearest: int64 [N] and [N, 5]: their classes, and those of their nearest training images.
        shown: the test images of the strips, [S]: the first of each class, or of classes evenly spaced.
        strips: for each uint8 [6, H, W, 3]: the test image, then its nearest training images, the nearest first.
        classes: their names.
        among: how many training images were compared, and how many there are.
    """

    h: np.ndarray
    labels: np.ndarray
    nearest: np.ndarray
    shown: Sequence[int]
    strips: Sequence[np.ndarray]
    classes: Sequence[str]
    among: tuple[int, int]


def see(directory: Path) -> Seen:
    """Test images of a run, and their nearest training images by the cosine of h.

    Raises:
        UserError: the weights or the data are not there, or are not scclr's own.
        ValueError: there are too few images.
    """
    import torch
    import torch.nn.functional as F

    from scclr.api import Run
    from scclr.components import load_splits, pick_device
    from scclr.evaluate.features import extract_features

    run, device = Run(directory), pick_device("auto")
    splits = load_splits(run.config)[1]
    if len(splits.test) < 2 or len(splits.train) < NEAREST:
        raise ValueError("the dataset has too few images with labels")
    parts = [(splits.test, min(IMAGES, len(splits.test))), (splits.train, min(CANDIDATES, len(splits.train)))]
    test, train = (part[torch.arange(count) * len(part) // count].to(device) for part, count in parts)
    model = run.model.to(device)
    h, others = (extract_features(model, part, run.config.probe.batch_size).double() for part in (test, train))
    nearest = (F.normalize(h) @ F.normalize(others).T).topk(NEAREST).indices
    labels = test.labels.cpu().numpy()
    first = [int(np.argmax(labels == label)) for label in np.unique(labels)]
    shown = first if len(first) <= STRIPS else [first[i * len(first) // STRIPS] for i in range(STRIPS)]
    strips = []
    for i in shown:
        blocks = (*test[slice(i, i + 1)].blocks(1), *train[nearest[i]].blocks(NEAREST))
        strips.append(np.concatenate([_in_colour(block) for block in blocks]))
    classes_of_nearest = train.labels[nearest].cpu().numpy()
    among = (len(train), len(splits.train))
    return Seen(h.cpu().numpy(), labels, classes_of_nearest, shown, strips, splits.classes, among)


def _in_colour(images: "Tensor") -> np.ndarray:
    """uint8 [n, C, H, W] as [n, H, W, 3]; images that are not of three channels are grey."""
    x = images if images.shape[1] == 3 else images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def in_a_plane(h: np.ndarray) -> tuple[np.ndarray, str, dict[str, str]]:
    """Points [N, 2] of representations [N, D], what they are, and the labels of their axes.

    They are UMAP's (McInnes et al. 2018) if umap-learn is installed, else the first two principal components.
    """
    if find_spec("umap") is not None and len(h) > UMAP_NEIGHBOURS:
        from umap import UMAP

        points = UMAP(n_neighbors=UMAP_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1).fit_transform(h)
        return points, f"UMAP (cosine, {UMAP_NEIGHBOURS} neighbours)", {"xlabel": "UMAP 1", "ylabel": "UMAP 2"}
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0).fit(h)
    first, second = 100 * pca.explained_variance_ratio_
    axes = {"xlabel": f"component 1, {first:.0f} % of the variance", "ylabel": f"component 2, {second:.0f} %"}
    return pca.transform(h), "Principal components", axes


def projection(seen: Seen) -> Picture:
    """h of test images in two dimensions."""
    points, what, axes = in_a_plane(seen.h)
    figure, (panel,) = drawing.new(height=4.2)
    classes = sorted(set(seen.labels.tolist()))
    for number, label in enumerate(classes):
        part = points[seen.labels == label]
        panel.scatter(
            part[:, 0],
            part[:, 1], s=7, alpha=0.55, linewidths=0, color=drawing.colour(number), marker=drawing.marker(number // 6),
            rasterized=True,
        )  # fmt: skip
    for label in classes if len(classes) <= NUMBERED else []:
        panel.annotate(
            str(label), np.median(points[seen.labels == label], axis=0), fontweight="bold", ha="center", va="center",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "#ffffff", "edgecolor": "#444444", "linewidth": 0.6},
            color="#000000",
        )  # fmt: skip
    panel.set(**axes)
    caption = f"{what} of h of n = {len(points):,} test images; a number is the median of the class of that label."
    return drawing.finish(figure, "embedding", "The representation in two dimensions", caption)


def neighbours(seen: Seen) -> Picture:
    """Strips of a test image and its nearest training images, each with its class, right or wrong."""
    from matplotlib.patches import Rectangle

    right = seen.nearest == seen.labels[:, None]  # [N, 5]
    count, wide = len(seen.shown), 1 + GAP + NEAREST
    figure, (panel,) = drawing.new(width=5.4, height=5.4 / wide * (LINE * count + 0.35))
    panel.set_axis_off()
    for row, (i, strip) in enumerate(zip(seen.shown, seen.strips, strict=True)):
        labels = [seen.labels[i], *seen.nearest[i]]
        for column, (image, label) in enumerate(zip(strip, labels, strict=True)):
            left, top = column + GAP * (column > 0), LINE * row
            inset = 0.06
            panel.imshow(
                image, extent=(left + inset, left + 1 - inset, top + 1 - inset, top + inset), interpolation="nearest"
            )
            same = column == 0 or bool(right[i, column - 1])
            name = _short(seen.classes[label])
            if column > 0:
                mark = "\N{CHECK MARK}" if same else "\N{BALLOT X}"
                style, edge = ("-", drawing.COLOURS[0]) if same else ((0, (2, 1.4)), drawing.COLOURS[5])
                panel.add_patch(
                    Rectangle((left + 0.03, top + 0.03), 0.94, 0.94, fill=False, linewidth=1.7, ls=style, ec=edge)
                )
                name = mark if same else f"{mark} {name}"
            panel.text(left + 0.5, top + 1.02, name, ha="center", va="top", fontsize=9.5, color=INK)
    panel.set(xlim=(-0.02, wide + 0.02), ylim=(LINE * count, -0.32), aspect="equal")
    for x, text in ((0.5, "test image"), (1 + GAP + NEAREST / 2, "nearest training images by the cosine of h")):
        panel.text(x, -0.08, text, ha="center", va="bottom", fontsize=9.5, color=INK)
    compared, total = seen.among
    some = f"{compared:,}" if compared == total else f"{compared:,} of the {total:,}"
    caption = (
        f"The first test image of {count} classes and its {NEAREST} nearest of {some} training images, the nearest "
        "first. A check mark and a solid frame: the same class; a cross and a dashed frame: another class, which is "
        f"named. Of n = {len(right):,} test images {100 * right.mean():.1f} % of the {NEAREST} nearest and "
        f"{100 * right[:, 0].mean():.1f} % of the nearest are of the same class."
    )
    return drawing.finish(figure, "neighbours", "Nearest training images", caption)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"

"""What the report of one run adds: what its encoder sees, its confusions, and its theory in sentences."""

import io
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scclr.config.errors import UserError, one_line
from scclr.report import drawing
from scclr.report.drawing import Picture
from scclr.report.encoded import neighbours, projection, see
from scclr.report.runs import Run
from scclr.run.files import read_bytes, read_json

NUMBERED = 20  # classes, up to which cells of the confusion matrix have numbers
MEANINGS = {
    "mean_norm2": "1 if all embeddings are the same point, 0 if they are centred.",
    "s_b": "How far apart the classes are: it is what a classifier of prototypes can use.",
    "b2": "How far the mean embedding of an image is from that of its class: supervised attraction minus contrastive.",
    "v_aug": "How much the augmentation moves an image's embedding: what attraction reduces.",
    "i_b": "The bias relative to what separates classes; unlike B2 it can be compared between balances.",
    "b1": "The bias as a mean distance; B2 <= B1 <= the root of B2.",
    "cdnv": "Variance within classes over squared distance between them: towards 0 at neural collapse.",
    "effective_rank": "How many directions the features use evenly (Roy & Vetterli 2007).",
    "supervised": "What the supervised objective would be with prototypes measured on the same images.",
    "upper_bound": "The contrastive loss, the bias and a constant: the supervised objective is at most this.",
    "slack": "How much the bound exceeds the supervised objective; it grows as classes separate.",
    "margin_gap": "Lost because the maximum over other classes is bounded by that over all classes.",
    "logsumexp_gap": "Lost because a maximum is bounded by a log-sum-exp; smaller at small temperatures.",
    "prior_gap": "Lost because classes are not of equal size.",
    "jensen_gap": "Lost because the mean of a class stands inside the exponential.",
    "class_excluded": "The bound whose negatives are of other classes, as with labels.",
    "class_excluded_slack": "How much that bound exceeds the supervised objective.",
    "cosine_prototypes": "The bound for prototypes of length 1.",
    "cosine_prototypes_slack": "How much that bound exceeds its objective.",
    "certified": "A bound that also holds for finitely many negatives, in expectation.",
    "alpha_mis": "Below this alpha, at this temperature and batch size, even the views of an image are kept apart.",
    "alpha_c": "Above this alpha, well-separated classes keep out features of single images.",
    "alpha_col": "Above this alpha, everything collapses to a point.",
}


class Row(NamedTuple):
    """A number of the theory, of z and of h where both are measured, and what it means."""

    title: str
    z: str
    h: str
    meaning: str


def figures(run: Run) -> tuple[list[Picture], list[str]]:
    """The figures of one run, and why one of them is not there."""
    pictures, notes = list[Picture](), list[str]()
    try:
        seen = see(run.directory)
        pictures += [projection(seen), neighbours(seen)]
    except (UserError, OSError, ValueError) as error:
        notes.append(f"There are no plots of what the encoder sees: {one_line(error)}")
    path = run.directory / "confusion.npz"
    try:
        if path.exists():
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as found:
                matrices = {name: found[name] for name in found.files if not name.startswith("baseline/")}
            square = {name: x for name, x in matrices.items() if x.ndim == 2 and len(set(x.shape)) == 1 and x.sum() > 0}
            pictures += [confusion(name, matrix, number) for number, (name, matrix) in enumerate(square.items())]
    except (UserError, OSError, ValueError, zipfile.BadZipFile) as error:
        notes.append(f"{path}: damaged ({one_line(error)})")
    return pictures, notes


def confusion(name: str, matrix: np.ndarray, number: int) -> Picture:
    """A confusion matrix int64 [K, K], rows the true classes, in percent of each row."""
    classes = len(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 3.4 if classes <= 10 else 5.0
    figure, (panel,) = drawing.new(width=side + 1.0, height=side)
    panel.grid(False)
    image = panel.imshow(shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    for i, j in np.ndindex(*matrix.shape) if classes <= NUMBERED else []:
        if shares[i, j] >= 0.5:
            panel.text(
                j,
                i,
                f"{shares[i, j]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if shares[i, j] < 60 else "black",
            )
    if classes <= NUMBERED:
        panel.set_xticks(range(classes))
        panel.set_yticks(range(classes))
    panel.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, ax=panel, label="% of the true class")
    caption = (
        f"Test images, n = {int(matrix.sum()):,}; {100 * np.trace(matrix) / matrix.sum():.2f} % lie on the diagonal."
    )
    return drawing.finish(figure, f"confusion{number or ''}", f"Confusions of {name}", caption)


def theory(directory: Path) -> list[Row]:
    """The rows of ``theory.json`` with a sentence each; none if the run has not measured it."""
    from scclr.theory.report import BIAS_ROWS, BOUND_ROWS, COLLAPSE_ROWS

    try:
        found = read_json(directory / "theory.json")
        rows = [
            Row(title, _estimate(found["z"][part][name]), _estimate(found["h"][part][name]), MEANINGS[name])
            for part, titles in (("bias", BIAS_ROWS), ("collapse", COLLAPSE_ROWS))
            for name, title in titles.items()
        ]
        bounds = found["bound"]
        own = [one for one in bounds if one["temperature"] == found["temperature"]] or bounds[:1]
        for one in own:
            titles = {name: title.strip() for name, title in BOUND_ROWS.items()}
            rows += [Row(title, _estimate(one[name]), "", MEANINGS[name]) for name, title in titles.items()]
        for name in ("alpha_mis", "alpha_c", "alpha_col"):
            if found["thresholds"][name] is not None:
                rows.append(Row(name, _estimate(found["thresholds"][name]), "", MEANINGS[name]))
    except (OSError, UserError, KeyError, TypeError, AttributeError):  # none, damaged, or of another version
        return []
    return rows


def _estimate(value: Any) -> str:
    if not isinstance(value, dict):
        return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
    error = value.get("se")
    return _estimate(value["value"]) + ("" if value["value"] is None or error is None else f" ± {error:.4f}")

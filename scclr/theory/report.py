"""The theory of a trained model: what ``stages=[theory]`` writes to ``theory.json``, and the table that it prints.

Dimensions: n images, M views of each, D features of h, P embedding dimensions of z.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from scclr.augment import Augment
from scclr.config.errors import UserError, one_line
from scclr.config.schema import TrainConfig
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.evaluate.features import chosen_rows
from scclr.losses import LogSumExpForm
from scclr.theory.bound import bound
from scclr.theory.collapse import collapse
from scclr.theory.embed import embed
from scclr.theory.moments import prototype_bias
from scclr.theory.objective import supervised_objective
from scclr.theory.sample import Sample, check_labels
from scclr.theory.thresholds import Edges, augmentation_correlations, edges

BIAS_ROWS = {  # a field of ``Bias``, and its row in the table
    "b2": "squared bias B2 = E|mu_x - mu_y|^2",
    "s_b": "variance between classes S_B",
    "v_aug": "variance between views V_aug",
    "mean_norm2": "squared norm of the mean |mu|^2",
    "i_b": "share of the bias B2 / (B2 + S_B)",
    "b1": "bias B1 = E|mu_x - mu_y|",
}
COLLAPSE_ROWS = {"cdnv": "class-distance normalized variance", "effective_rank": "effective rank"}
BOUND_ROWS = {
    "supervised": "supervised objective (plug-in)",
    "upper_bound": "upper bound",
    "slack": "  slack",
    "margin_gap": "    gap: maximum over all classes",
    "logsumexp_gap": "    gap: maximum to log-sum-exp",
    "prior_gap": "    gap: unequal class shares",
    "jensen_gap": "    gap: mean inside exp (Jensen)",
    "class_excluded": "bound without own class",
    "class_excluded_slack": "  slack",
    "cosine_prototypes": "bound for unit-length prototypes",
    "cosine_prototypes_slack": "  slack",
    "certified": "certified upper bound",
}
BOUND_METRICS = (*(name for name in BOUND_ROWS if name != "supervised"), "q_same", "nscl_gap")
SPACES = {"z": "embedding z", "h": "representation h"}
TITLE, COLUMN = 34, 17  # characters


@torch.no_grad()
def measure(
    model: Model,
    data: ImageSet,
    augment: Augment,
    config: TrainConfig,
    form: LogSumExpForm | None,
) -> dict[str, Any]:
    """What ``theory.json`` holds, as plain numbers. Every process of a group calls this and gets the same.

    Bounds are at the temperature of the training, if its loss has one, and at ``config.theory.temperatures``; alpha is
    that at the end of the training.

    Args:
        data: labelled images, of which ``config.theory.images`` are drawn.
        form: of the training's loss; its thresholds are None without it.

    Raises:
        UserError: the images do not suffice (``check_labels``), or embeddings are not finite.
    """
    temperature = config.loss.get("temperature")
    temperatures = {*config.theory.temperatures, *([] if temperature is None else [temperature])}
    with _embedded(model, data, augment, config) as (h, z, labels):
        found = describe(
            h, z, labels, sorted(temperatures), alpha=config.last_alpha, form=form,
            images=config.pretrain.batch_size, views=len(augment.views),
        )  # fmt: skip
    return {**found, "temperature": temperature}


@torch.no_grad()
def bound_now(model: Model, data: ImageSet, augment: Augment, config: TrainConfig) -> dict[str, float]:
    """The bound of a model in training, such as ``bound/slack``: the fields of ``Bound`` that ``headline`` has too.

    It is at the temperature of the training, or the tightest of those at ``config.theory.temperatures`` if the loss has
    none. A schedule's last alpha counts throughout, so that all steps are compared by one objective.

    Raises:
        UserError: as ``measure``.
    """
    temperature = config.loss.get("temperature")
    temperatures = config.theory.temperatures if temperature is None else [temperature]
    with _embedded(model, data, augment, config) as (_, z, labels):
        at = min(bound(z, labels, temperatures, _lam(config.last_alpha)), key=lambda one: one.upper_bound.value)
    values = {f"bound/{name}": getattr(at, name).value for name in BOUND_METRICS}
    return {name: value for name, value in values.items() if math.isfinite(value)}


@contextmanager
def _embedded(
    model: Model, data: ImageSet, augment: Augment, config: TrainConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """h and z of the images that ``measure`` draws, with labels; what is wrong with them becomes a ``UserError``."""
    chosen = data[chosen_rows(len(data), config.seed, config.theory.images).to(data.labels.device)]
    training = model.training
    try:
        check_labels(chosen.labels)
        h, z = embed(model.eval(), chosen, augment, config.theory.views, config.probe.batch_size, seed=config.seed)
        yield h, z, chosen.labels
    except ValueError as error:
        raise UserError(f"theory: {one_line(error)}") from error
    finally:
        model.train(training)


def _lam(alpha: float) -> float:
    """The weight of repulsion relative to attraction; 1 for alpha = 0, where it would be infinite."""
    return (1 - alpha) / alpha if alpha > 0 else 1.0


def describe(
    h: Tensor,
    z: Tensor,
    labels: Tensor,
    temperatures: list[float],
    *,
    alpha: float,
    form: LogSumExpForm | None,
    images: int,
    views: int,
) -> dict[str, Any]:
    """All numbers of the theory of h [n, M, D], z [n, M, P] and int64 labels [n]; see ``measure``.

    Args:
        views: in a training step; M is the number of those that are measured.

    Raises:
        ValueError: as ``check_labels`` and ``Sample``.
    """
    lam = _lam(alpha)
    bias = prototype_bias(z, labels)
    classes = len(labels.unique()) - len(bias.dropped)
    r = augmentation_correlations(h)
    within = augmentation_correlations(h, labels)
    found: dict[str, Any] = {
        "images": bias.images,
        "views": bias.views,
        "dropped": bias.dropped,
        "alpha": alpha,
        "lam": lam,
        "identity_error": identity_error(z, labels),
        "z": {"bias": asdict(bias), "collapse": asdict(collapse(z, labels))},
        "h": {"bias": asdict(prototype_bias(h, labels)), "collapse": asdict(collapse(h, labels))},
        "objective": asdict(supervised_objective(z, labels, lam)),
        "bound": [asdict(one) for one in bound(z, labels, temperatures, lam)],
        "thresholds": {
            "correlations": r.tolist(),
            "instance_correlations": within.tolist(),
            **dict.fromkeys(Edges._fields),
        },
    }
    if form is not None:
        found["thresholds"] |= edges(
            form, r_max=r[0].item(), r_within=within[0].item(), classes=classes,
            images=images, views=views, width=z.shape[2],
        )._asdict()  # fmt: skip
    return {key: plain(value) for key, value in found.items()}


def identity_error(z: Tensor, labels: Tensor) -> float:
    """|A_sup - A_ssl - B2| of the rows as a population, where B2 is a mean of squared distances: rounding error."""
    sample = Sample(z, labels, population=True)
    moments, prototypes = sample.moments(), sample.sums.total[0] / sample.sums.n[0].unsqueeze(1)
    distances = [(part.mean(1) - prototypes[y]).square().sum() for part, y, _ in sample.chunks()]
    return abs((moments.a - moments.share @ moments.b - torch.stack(distances).sum() / sample.images).item())


def headline(theory: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``measure`` that join a run's metrics, with standard errors, without what is not finite.

    Bounds are those at the temperature of the training.
    """
    estimates = {f"theory/{space}/{name}": theory[space]["bias"][name] for space in SPACES for name in BIAS_ROWS}
    for at in theory["bound"]:
        if at["temperature"] == theory["temperature"]:
            estimates |= {f"theory/bound/{name}": at[name] for name in BOUND_METRICS}
    values = {name: one["value"] for name, one in estimates.items()}
    values |= {f"{name}/se": one["se"] for name, one in estimates.items()}
    values |= {f"theory/{space}/{name}": theory[space]["collapse"][name] for space in SPACES for name in COLLAPSE_ROWS}
    values |= {f"theory/{name}": theory["thresholds"][name] for name in ("alpha_col", "alpha_c", "alpha_mis")}
    return {name: value for name, value in values.items() if value is not None}


def table(theory: dict[str, Any]) -> str:
    """The numbers of ``measure`` for the terminal; of the bounds that of the training's temperature.

    A loss without a temperature gets the tightest bound.
    """
    objective, limits = theory["objective"], theory["thresholds"]
    bias = {name: [theory[space]["bias"][name] for space in SPACES] for name in BIAS_ROWS}
    collapsed = {name: [theory[space]["collapse"][name] for space in SPACES] for name in COLLAPSE_ROWS}
    own = [one for one in theory["bound"] if one["temperature"] == theory["temperature"]]
    at = own[0] if own else min(theory["bound"], key=_upper_bound)
    more = ", ".join(f"{one['temperature']:g}" for one in theory["bound"] if one is not at)
    lines = [
        "",
        f"theory of {theory['images']:,} images with {theory['views']} views each; alpha = {theory['alpha']:g}, "
        f"lambda = {theory['lam']:g}; ± is one standard error",
        "",
        _row("", SPACES.values()),
        *(_row(title, map(_estimate, bias[name])) for name, title in BIAS_ROWS.items()),
        *(_row(title, map(_number, collapsed[name])) for name, title in COLLAPSE_ROWS.items()),
        "The first four rows sum to 1. Supervised attraction - contrastive attraction = B2, with a rounding error of "
        f"{theory['identity_error']:.0e}.",
        "",
        f"supervised objective of z: between {_estimate(objective['lower'])} (cross-split) and "
        f"{_estimate(objective['upper'])} (plug-in)",
        "bounded by contrastive loss + B2 + constant, where slack = lambda x (sum of the gaps):",
        _row("at the training's temperature" if own else "at temperature", [f"{at['temperature']:g}"]),
        *(_row(title, [_estimate(at[name])]) for name, title in BOUND_ROWS.items()),
        *([f"theory.json holds the bounds at temperatures {more} too"] if more else []),
        "",
    ]
    if limits["alpha_col"] is not None:
        lines.append(
            f"above alpha = {limits['alpha_col']:.3f} the features of h collapse "
            f"(largest correlation between views: {limits['correlations'][0]:.3f})"
        )
    if limits["alpha_c"] is not None:
        lines.append(
            f"above alpha = {limits['alpha_c']:.3f} well-separated classes keep out features within classes "
            f"(largest correlation: {limits['instance_correlations'][0]:.3f})"
        )
    if limits["alpha_mis"]:  # 0 if positives coincide at every alpha
        verb = "separates" if limits["alpha_mis_exact"] else "may separate"
        lines.append(f"below alpha = {limits['alpha_mis']:.3f} the best embedding {verb} positives")
    if theory["dropped"]:
        lines.append(f"left out, because they have one image: classes {', '.join(map(str, theory['dropped']))}")
    return "\n".join(lines)


def _upper_bound(at: dict[str, Any]) -> float:
    value: float | None = at["upper_bound"]["value"]
    return math.inf if value is None else value


def _row(title: str, cells: Iterable[str]) -> str:
    return f"{title:<{TITLE}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells)


def _estimate(estimate: dict[str, float | None]) -> str:
    value, se = estimate["value"], estimate["se"]
    return _number(value) + ("" if value is None or se is None else f" ± {se:.4f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def plain(node: Any) -> Any:
    """``node`` with lists for tuples, and with None for numbers that are not finite, which JSON does not have."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node

"""The theory on a trained model: what ``stages=[theory]`` measures, and its table.

Dimensions: n images, M views of each, D features of h, P embedding dimensions of z.
"""

import math
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.augment import Augment, generator, to_grey
from scclr.config import TheoryConfig, UserError, one_line
from scclr.datasets import ImageSet
from scclr.distributed import World
from scclr.loader import views
from scclr.model import Model
from scclr.theory.bound import bound
from scclr.theory.collapse import collapse
from scclr.theory.moments import prototype_bias
from scclr.theory.objective import supervised_objective
from scclr.theory.pairs import everyone
from scclr.theory.sample import Sample
from scclr.theory.thresholds import (
    augmentation_correlations,
    class_threshold,
    collapse_threshold,
    misalignment_onset,
)

AFTER = 2**40  # the first step whose views no training has seen
PARTS = ("b2", "s_b", "v_aug", "mean_norm2", "i_b", "b1")
STEPS = ("t5", "t5_slack", "e0", "e1", "e2", "e3", "t4", "t4_slack", "t6", "t6_slack", "certified")


@torch.no_grad()
def embed(
    model: Model,
    data: ImageSet,
    augment: Augment,
    count: int,
    batch: int,
    *,
    seed: int,
    world: World = World(),  # noqa: B008
) -> tuple[Tensor, Tensor, Tensor]:
    """(h [n, M, D], z [n, M, P], labels [n]) of M = ``count`` fresh views of this process's share of ``data``.

    Rows have unit length; the model's mode is its own. Where ``augment`` has several recipes, views take them in turn.
    Processes share out batches, so that every image has the views that it has in a single one.
    """
    starts, calls = range(0, len(data), batch), -(-count // len(augment.views))
    share = -(-len(starts) // world.size)
    hs: list[Tensor] = []
    zs: list[Tensor] = []
    own = [data[slice(first, first + batch)] for first in starts[world.rank * share :][:share]]
    kept = None if own else 0  # more processes than batches: one without images needs their shapes all the same
    for number, part in enumerate(own or [data[slice(0, 1)]], start=world.rank * share):
        steps = (AFTER + number * calls + call for call in range(calls))
        found = [model(in_channels(views(part, augment, seed=seed, step=step), model.channels)) for step in steps]
        for rows, both in zip((hs, zs), zip(*found, strict=True), strict=True):
            rows.append(torch.cat(both).float().unflatten(0, (-1, len(part)))[:count].transpose(0, 1))  # [b, M, D]
    labels = torch.cat([part.labels for part in own] or [data.labels])[:kept]
    return F.normalize(torch.cat(hs), dim=2)[:kept], F.normalize(torch.cat(zs), dim=2)[:kept], labels


def in_channels(x: Tensor, channels: int) -> Tensor:
    """Grey views [R, 1, S, S] repeated, or colour ones as luma, to suit an encoder."""
    if x.shape[1] == channels:
        return x
    return to_grey(x) if channels == 1 else x.expand(-1, channels, -1, -1)


@torch.no_grad()
def measure(
    model: Model,
    data: ImageSet,
    augment: Augment,
    config: TheoryConfig,
    *,
    alpha: float,
    temperature: float | None,
    images: int,
    batch: int,
    seed: int,
    world: World,
) -> dict[str, Any]:
    """What ``theory.json`` holds, as plain numbers: the same in every process.

    Args:
        data: labelled images, of which ``config.images`` are drawn.
        alpha: the balance at the end of the training; 0 has no finite lam, and 1 is taken.
        temperature: the training's, added to ``config.temperatures``; None where the loss has none.
        images: of a training step.
        batch: images in a forward pass.

    Raises:
        UserError: what ``prototype_bias``, ``bound`` and ``augmentation_correlations`` refuse.
    """
    order = torch.randperm(len(data), generator=generator(seed, 0, stream=2))[: config.images]
    chosen = data[order.to(data.labels.device)]
    training = model.training
    h, z, labels = embed(model.eval(), chosen, augment, config.views, batch, seed=seed, world=world)
    model.train(training)
    lam = (1 - alpha) / alpha if alpha > 0 else 1.0
    temperatures = sorted({*config.temperatures, *([] if temperature is None else [temperature])})
    try:
        bias = prototype_bias(z, labels, world=world)
        found = {
            "images": bias.images,
            "views": bias.views,
            "dropped": bias.dropped,
            "alpha": alpha,
            "lam": lam,
            "temperature": temperature,
            "identity_error": identity_error(z, labels, world),
            "z": {"bias": asdict(bias), "collapse": asdict(collapse(z, labels, world=world))},
            "h": {
                "bias": asdict(prototype_bias(h, labels, world=world)),
                "collapse": asdict(collapse(h, labels, world=world)),
            },
            "objective": asdict(supervised_objective(z, labels, lam, world=world)),
            "bound": [asdict(one) for one in bound(z, labels, temperatures, lam, world=world)],
        }
        every = everyone(h, world).unbind(1)
        r = augmentation_correlations(*every)
        within = augmentation_correlations(*every, labels=everyone(labels, world))
    except ValueError as error:
        raise UserError(f"theory: {one_line(error)}") from error
    classes = len(chosen.labels.unique()) - len(bias.dropped)
    found["thresholds"] = {
        "correlations": r.tolist(),
        "instance_correlations": within.tolist(),
        "alpha_col": collapse_threshold(r[0].item()),
        "alpha_c": None if temperature is None else class_threshold(classes, temperature, within[0].item()),
        "alpha_mis": None if temperature is None else misalignment_onset(images, temperature),
    }
    return {key: plain(value) for key, value in found.items()}


def identity_error(z: Tensor, labels: Tensor, world: World) -> float:
    """|A_sup - A_ssl - E |mu_x - mu_y|^2| of the rows as a population, by products and by distances: rounding."""
    sample = Sample(z, labels, population=True, world=world)
    moments, prototypes = sample.moments(), sample.sums.total[0] / sample.sums.n[0].unsqueeze(1)
    distances = sum((part.mean(1) - prototypes[y]).square().sum().view(1) for part, y in sample.chunks())
    assert isinstance(distances, Tensor)
    return abs((moments.a - moments.share @ moments.b - world.sum(distances) / sample.images).item())


def headline(theory: dict[str, Any]) -> dict[str, float]:
    """What goes beside a run's metrics, each with its standard error; without what is not finite."""
    estimates = {f"theory/{space}/{name}": theory[space]["bias"][name] for space in "zh" for name in PARTS}
    at = [one for one in theory["bound"] if one["temperature"] == theory["temperature"]]
    estimates |= {f"theory/bound/{name}": at[0][name] for name in (*STEPS, "q_same", "nscl_gap") if at}
    values = {name: one["value"] for name, one in estimates.items()}
    values |= {f"{name}/se": one["se"] for name, one in estimates.items()}
    values |= {f"theory/{name}": theory["thresholds"][name] for name in ("alpha_col", "alpha_c", "alpha_mis")}
    return {name: value for name, value in values.items() if value is not None}


def table(theory: dict[str, Any]) -> str:
    """``measure`` for a reader."""
    z, h = theory["z"]["bias"], theory["h"]["bias"]
    titles = {
        "b2": "bias B2 = E|mu_x - mu_y|^2",
        "s_b": "between classes S_B",
        "v_aug": "between views V_aug",
        "mean_norm2": "|mu|^2",
        "i_b": "I_B = B2 / (B2 + S_B)",
        "b1": "unsquared bias B1",
    }
    lines = [
        "",
        f"theory: {theory['images']:,} images, {theory['views']} views each; alpha {theory['alpha']:g}",
        f"identity A_sup - A_ssl = B2 holds to {theory['identity_error']:.0e}; "
        "|mu|^2 + S_B + B2 + V_aug = 1; ± is one standard error",
        f"{'':<28}{'z (embedding)':>20}{'h (representation)':>20}",
        *(f"{title:<28}{_shown(z[name]):>20}{_shown(h[name]):>20}" for name, title in titles.items()),
        f"{'bound at temperature':<28}" + "".join(f"{one['temperature']:>20g}" for one in theory["bound"]),
    ]
    steps = {
        "supervised": "L_sup",
        "t5": "T5  L_bal + B2 + prior",
        "t5_slack": "    slack",
        "e0": "    e0  nearest-class margin",
        "e1": "    e1  max to log-sum-exp",
        "e2": "    e2  unequal shares",
        "e3": "    e3  Jensen",
        "t4": "T4' own class excluded",
        "t4_slack": "    slack",
        "t6": "T6  cosine prototypes",
        "t6_slack": "    slack",
        "certified": "T5  certified",
    }
    lines += [
        f"{title:<28}" + "".join(f"{_shown(one[name]):>20}" for one in theory["bound"]) for name, title in steps.items()
    ]
    edges = theory["thresholds"]
    lines.append(f"r_max {edges['correlations'][0]:.3f}: features of h collapse above alpha {edges['alpha_col']:.3f}")
    if edges["alpha_c"] is not None:
        lines.append(
            f"r_instance {edges['instance_correlations'][0]:.3f}: kept out above alpha {edges['alpha_c']:.3f}; "
            f"positives are kept apart below alpha {edges['alpha_mis']:.3f}"
        )
    if theory["dropped"]:
        lines.append(f"classes with one image, left out: {', '.join(map(str, theory['dropped']))}")
    return "\n".join(lines)


def _shown(estimate: dict[str, float | None]) -> str:
    value, se = estimate["value"], estimate["se"]
    return "-" if value is None else f"{value:.4f}" + ("" if se is None else f" ± {se:.4f}")


def plain(node: Any) -> Any:
    """Numbers as JSON has them: None for what is not finite."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node

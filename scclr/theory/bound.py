"""The supervised objective, and the contrastive loss that bounds it, step by step.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images; T temperatures tau.
F is a view of class Y, F' another view of its image, F° a view of another image; mu_y are prototypes, p their shares,
nu = min p; lam = (1 - alpha) / alpha.

    L_sup = -E <F, mu_Y> + lam E max_{y != Y} <F, mu_y>                          the supervised objective
    L_bal = -E <F, F'> + lam tau E log E_F° exp(<F, F°> / tau)                   the contrastive one

    T5    L_sup <= L_bal + B2 + lam tau log(1 / nu)
          Attraction is exact, the bias makes the difference. Repulsion loses, on the way from left to right,
          e0: max over y != Y -> over all y;    e1: -> tau log sum_y exp(. / tau);
          e2: -> tau log(1/nu) + tau log sum_y p_y exp(. / tau);    e3: -> exp of the mean -> mean of the exp (Jensen).
    T4'   the same with F° of other classes only:
          L_sup <= -E <F, F'> + B2 + lam tau E log E[exp(<F, F°> / tau) | Y° != Y]
                   + lam tau E log((1 - p_Y) / min_{y != Y} p_y)
    T6    L_sup of prototypes of unit length <= the right side of T5 + lam (1 - min |mu_y|)

A view is compared with the other n - 1 images, so prototypes, shares and means over F° leave its own image out. With
these every step is at least 0 for every view of every sample, not only in expectation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.distributed import World
from scclr.theory.pairs import GROUPS, Tile, certified_mean, jackknife, leave_out, pair_sums
from scclr.theory.sample import Estimate, Sample


@dataclass(frozen=True)
class Bound:
    """At one temperature. ``t5``, ``t4``, ``t6`` and ``certified`` are values of the right sides above.

    ``repel_decoupled`` is too small in the mean, which makes t5, t4 and t6 estimates; ``repel_ntxent``, with the
    positive, is neither an upper nor a lower one. ``certified`` has the repulsion that is at least the population's
    in the mean (``certified_mean``): of random images with independent views and known class shares, its expectation
    is at least L_sup.
    """

    temperature: float
    lam: float
    supervised: Estimate  # L_sup, plug-in prototypes: too large in the mean
    attract: Estimate  # -E <F, F'>
    b2: Estimate
    repel_decoupled: Estimate
    repel_jackknife: Estimate  # the same less its bias of order 1 / n
    repel_ntxent: Estimate
    repel_certified: Estimate
    prior: Estimate  # tau log(1 / nu)
    t5: Estimate
    t5_slack: Estimate  # lam (e0 + e1 + e2 + e3)
    e0: Estimate  # the nearest-prototype margin: the better the classes are told apart, the larger
    e1: Estimate
    e2: Estimate
    e3: Estimate
    t4: Estimate  # class-excluded
    t4_slack: Estimate
    t6: Estimate  # cosine
    t6_slack: Estimate
    certified: Estimate
    certified_slack: Estimate
    q_same: Estimate
    nscl_gap: Estimate


@torch.no_grad()
def bound(
    z: Tensor,
    labels: Tensor,
    temperatures: Sequence[float],
    lam: float,
    *,
    population: bool = False,
    world: World = World(),  # noqa: B008
) -> list[Bound]:
    """The bounds at each of ``temperatures``, with standard errors by a delete-a-group jackknife at fixed class shares.

    Every temperature > 0 gives a valid bound of the same L_sup: the tightest is the one to quote. z: [n, M, d] unit
    rows; labels: int64 [n]. Takes O(n^2 M^2 d) time, O(n M d) memory.

    Raises:
        ValueError: as ``Sample``; fewer than two classes; a temperature that is not positive; lam negative or infinite.
    """
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures={list(temperatures)}: give one or more positive numbers")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam={lam}: give a weight of repulsion from 0; it is (1 - alpha) / alpha")
    sample = Sample(z, labels, population=population, world=world, groups=1 if population else GROUPS)
    if sample.classes < 2:
        raise ValueError("one class only: there is no other to be repelled from")
    versions = [None] if population else [None, *range(sample.groups)]  # without which group of images
    tau = torch.tensor(temperatures, dtype=torch.float64, device=z.device).view(-1, 1)
    sums = z.new_zeros(len(versions), len(STEPS), len(tau), dtype=torch.float64)
    for tile in pair_sums(sample, temperatures):
        for version, without in enumerate(versions):
            values = _steps(sample, tile, tau, without).mean(3)  # [Q, T, b]
            sums[version] += values[:, :, tile.group != without].sum(2) if without is not None else values.sum(2)
    sums, count = world.sum(sums), sample.sums.n.sum(1)
    found = []
    for version, without in enumerate(versions):
        images = sample.images - (0 if without is None else count[without])
        steps = dict(zip(STEPS, sums[version] / images, strict=True))  # each [T]
        found.append(_bounds(sample, steps, tau.squeeze(1), lam, without))
    stacked = {name: torch.stack([one[name] for one in found]) for name in found[0]}  # each [1 + G, T]
    estimates: dict[str, list[Estimate]] = {}
    for name, values in stacked.items():
        corrected, error = jackknife(values, population=population)
        estimates[name] = [Estimate(*pair) for pair in zip(values[0].tolist(), error.tolist(), strict=True)]
        if name == "repel_decoupled":
            pairs = zip(corrected.tolist(), error.tolist(), strict=True)
            estimates["repel_jackknife"] = [Estimate(*pair) for pair in pairs]
    return [
        Bound(temperature, lam, **{name: values[t] for name, values in estimates.items()})
        for t, temperature in enumerate(temperatures)
    ]


STEPS = (
    "repel", "repel_cosine", "e0", "e1", "e2", "e3", "repel_decoupled", "prior", "excluded", "repel_certified",
    "repel_ntxent", "q_same", "nscl_gap",
)  # fmt: skip


def _steps(sample: Sample, tile: Tile, tau: Tensor, without: int | None) -> Tensor:
    """STEPS for every view of a tile, [Q, T, b, M]; of images that are not in the group ``without``."""
    count, total, *_ = sample.without(without)  # [C], [C, d]
    own, n, y = sample.own, count.sum(), tile.labels
    zb, mine = tile.z.mean(1, keepdim=True), F.one_hot(y, sample.classes).bool().unsqueeze(1)
    to_class = tile.z @ (total / count.unsqueeze(1)).T  # [b, M, C]: <F, mu_y>
    to_own = (tile.z * (total[y].unsqueeze(1) - own * zb)).sum(2) / (count[y] - own).unsqueeze(1)  # [b, M]
    share = (count - own * mine) / (n - own)  # [b, 1, C]: among the other images
    others = to_class.masked_fill(mine, -math.inf)
    length = (total / count.unsqueeze(1)).norm(dim=1)
    cosine = (to_class / length).masked_fill(mine, -math.inf).amax(2)
    repel, every = others.amax(2), torch.where(mine, to_own.unsqueeze(2), to_class)
    t = tau.view(-1, 1, 1)
    scaled = every / t.unsqueeze(3)  # [T, b, M, C]
    soft, weighed = t * scaled.logsumexp(3), t * (scaled + share.log()).logsumexp(3)  # [T, b, M]
    same, foreign = (leave_out(x, without, 1) for x in (tile.same, tile.other))
    sums = same + foreign
    views, shift = sample.views, 1  # tau log exp(1 / tau): sums are over exp(1 / tau)
    decoupled = t * (sums / (views * (n - own))).log() + shift
    prior = -t * share.amin(2).log()
    rarest = share.masked_fill(mine, math.inf).amin(2)  # of the other classes
    rest = n - count[y].unsqueeze(1)  # images of other classes, [b, 1]
    excluded = t * (foreign / (views * rest)).log() + shift + t * (rest / (n - own) / rarest).log()
    certified, ntxent = (torch.full_like(decoupled, math.nan) for _ in range(2))  # a population is not a batch
    if own:
        certified = t * certified_mean(sums, n, views, t)
        ntxent = t * ((sums + tile.positive) / (views * n - 1)).log() + shift
    rows = (
        repel, cosine, every.amax(2) - repel, soft - every.amax(2), weighed + prior - soft, decoupled - weighed,
        decoupled, prior, excluded, certified, ntxent, same / sums, torch.log1p(same / foreign),
    )  # fmt: skip
    return torch.stack([row.expand(len(tau), *repel.shape) for row in rows])


def _bounds(sample: Sample, step: dict[str, Tensor], tau: Tensor, lam: float, without: int | None) -> dict[str, Tensor]:
    """The fields of ``Bound`` from the means of STEPS, each [T]."""
    a, b_class, share, _ = sample.moments(without)
    count, total, *_ = sample.without(without)
    b = share @ b_class
    length = b_class.clamp(min=0).sqrt()
    supervised = -b + lam * step["repel"]
    cosine = -share @ length + lam * step["repel_cosine"]
    t5 = -b + lam * (step["repel_decoupled"] + step["prior"])
    t4 = -b + lam * step["excluded"]
    t6 = t5 + lam * (1 - (total / count.unsqueeze(1)).norm(dim=1).min())
    certified = -b + lam * (step["repel_certified"] - tau * share.min().log())
    same = ("repel_decoupled", "repel_ntxent", "repel_certified", "prior", "e0", "e1", "e2", "e3", "q_same", "nscl_gap")
    return {name: step[name] for name in same} | {
        "supervised": supervised,
        "attract": (-a).expand_as(tau),
        "b2": (a - b).expand_as(tau),
        "t5": t5,
        "t5_slack": t5 - supervised,
        "t4": t4,
        "t4_slack": t4 - supervised,
        "t6": t6,
        "t6_slack": t6 - cosine,
        "certified": certified,
        "certified_slack": certified - supervised,
    }

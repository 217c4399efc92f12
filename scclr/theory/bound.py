"""The bound on the supervised objective by the contrastive loss, and how much each of its steps loses.

Dimensions: n images, M views of each, d embedding dimensions, C classes, G groups of images, T temperatures tau.
F is a view of class Y, F' another view of its image, F° a view of another image; mu_y are prototypes, p their shares,
nu = min p; lam = (1 - alpha) / alpha.

    L_sup = -E <F, mu_Y> + lam E max_{y != Y} <F, mu_y>                          the supervised objective
    L_bal = -E <F, F'> + lam tau E log E_F° exp(<F, F°> / tau)                   the contrastive objective

    upper_bound        L_sup <= L_bal + B2 + lam tau log(1 / nu)
        Attraction differs by B2 exactly. Repulsion is bounded in four steps, each of which loses a gap:
        margin_gap     the maximum over y != Y becomes the maximum over all y
        logsumexp_gap  that becomes tau log sum_y exp(<F, mu_y> / tau)
        prior_gap      that becomes tau log(1 / nu) + tau log sum_y p_y exp(<F, mu_y> / tau)
        jensen_gap     exp of a mean becomes the mean of exp
    class_excluded     the same with F° of other classes only:
                       L_sup <= -E <F, F'> + B2 + lam tau E log E[exp(<F, F°> / tau) | Y° != Y]
                                + lam tau E log((1 - p_Y) / min_{y != Y} p_y)
    cosine_prototypes  with prototypes of unit length L_sup <= the upper bound + lam (1 - min_y |mu_y|)

A view is compared with the other n - 1 images: prototypes, shares and means over F° leave its own image out. Then every
gap is at least 0 for every view of every sample, not only in expectation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scclr.theory.pairs import JACKKNIFE_GROUPS, Tile, certified_mean, jackknife, pair_sums, sum_without
from scclr.theory.sample import Estimate, Sample

GAPS = ("margin_gap", "logsumexp_gap", "prior_gap", "jensen_gap")


@dataclass(frozen=True)
class Bound:
    """The right sides above at one temperature; a slack is a right side minus its L_sup.

    ``upper_bound``, ``class_excluded`` and ``cosine_prototypes`` are estimates of bounds, since ``repel_decoupled`` is
    too small in expectation. ``certified`` takes ``repel_certified`` instead: for random images with independent views
    and known class shares, its expectation is at least L_sup.
    """

    temperature: float
    lam: float
    supervised: Estimate  # L_sup with plug-in prototypes, which is too large in expectation
    attract: Estimate  # -E <F, F'>
    b2: Estimate
    repel_decoupled: Estimate  # over views of other images; too small in expectation
    repel_jackknife: Estimate  # the same without its bias of order 1 / n
    repel_ntxent: Estimate  # with the positive, as in NT-Xent; neither an upper nor a lower bound
    repel_certified: Estimate  # with the own image at similarity 1; too large in expectation
    prior: Estimate  # tau log(1 / nu)
    upper_bound: Estimate
    slack: Estimate  # lam times the sum of the four gaps
    margin_gap: Estimate  # grows as views come closer to their own prototype than to others
    logsumexp_gap: Estimate
    prior_gap: Estimate
    jensen_gap: Estimate
    class_excluded: Estimate
    class_excluded_slack: Estimate
    cosine_prototypes: Estimate
    cosine_prototypes_slack: Estimate
    certified: Estimate
    certified_slack: Estimate
    q_same: Estimate  # softmax mass on the anchor's class among the views of other images
    nscl_gap: Estimate  # E -log(1 - q_same): decoupled minus negatives-only supervised loss is 2 (1 - alpha) times this


@torch.no_grad()
def bound(
    z: Tensor, labels: Tensor, temperatures: Sequence[float], lam: float, *, population: bool = False
) -> list[Bound]:
    """The bounds at each of ``temperatures``, with standard errors by a delete-a-group jackknife at fixed class shares.

    At every temperature > 0 the bound is a valid one of the same L_sup, so the smallest is the one to quote. Takes
    O(n^2 M^2 d) time and O(n M d) memory.

    Args:
        z: [n, M, d], unit rows.
        labels: int64 [n].
        lam: weight of repulsion, (1 - alpha) / alpha.

    Raises:
        ValueError: as ``Sample``; fewer than two classes; a temperature that is not positive; lam negative or infinite.
    """
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures={list(temperatures)}: give one or more positive numbers")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam={lam}: give a weight of repulsion from 0; it is (1 - alpha) / alpha")
    sample = Sample(z, labels, population=population, groups=JACKKNIFE_GROUPS, least_classes=2)
    tau = torch.tensor(temperatures, dtype=torch.float64, device=z.device)
    sums: list[dict[str, Tensor]] = [{} for _ in sample.versions]
    for tile in pair_sums(sample, temperatures):
        for sum_of, without in zip(sums, sample.versions, strict=True):
            kept = slice(None) if without is None else tile.group != without
            for name, values in _values_per_view(sample, tile, tau.view(-1, 1, 1), without).items():
                sum_of[name] = sum_of.get(name, 0) + values.mean(-1)[..., kept].sum(-1)
    results = []
    for sum_of, without in zip(sums, sample.versions, strict=True):
        images = sample.without(without).n.sum()
        means = {name: value / images for name, value in sum_of.items()}
        results.append(_fields(sample, means, tau, lam, without))
    found: dict[str, tuple[Tensor, Tensor]] = {}  # value and standard error, each [T]
    for name in results[0]:
        values = torch.stack([result[name].expand_as(tau) for result in results])  # [1 + G, T]
        corrected, error = jackknife(values)
        found[name] = values[0], error
        if name == "repel_decoupled":
            found["repel_jackknife"] = corrected, error
    return [
        Bound(temperature, lam, **{name: Estimate(x[t].item(), se[t].item()) for name, (x, se) in found.items()})
        for t, temperature in enumerate(temperatures)
    ]


def _values_per_view(sample: Sample, tile: Tile, t: Tensor, without: int | None) -> dict[str, Tensor]:
    """What the bounds are means of: for every view of a tile, [T, b, M], with the group ``without`` left out.

    Where a value does not depend on the temperature or the view, its T is left out or its M is 1. ``t`` is tau,
    [T, 1, 1].
    """
    count, total, *_ = sample.without(without)  # [C], [C, d]
    own, n, y, views = sample.own, count.sum(), tile.labels, sample.views
    zb, own_class = tile.z.mean(1, keepdim=True), F.one_hot(y, sample.classes).bool().unsqueeze(1)
    to_class = tile.z @ (total / count.unsqueeze(1)).T  # [b, M, C]: <F, mu_y>
    to_own = (tile.z * (total[y].unsqueeze(1) - own * zb)).sum(2) / (count[y] - own).unsqueeze(1)  # [b, M]
    share = (count - own * own_class) / (n - own)  # [b, 1, C]: among the other images
    length = (total / count.unsqueeze(1)).norm(dim=1)
    cosine = (to_class / length).masked_fill(own_class, -math.inf).amax(2)
    repel = to_class.masked_fill(own_class, -math.inf).amax(2)
    to_every = torch.where(own_class, to_own.unsqueeze(2), to_class)
    scaled = to_every / t.unsqueeze(3)  # [T, b, M, C]
    equal_shares, by_share = t * scaled.logsumexp(3), t * (scaled + share.log()).logsumexp(3)  # [T, b, M]
    same, other = (sum_without(x, without) for x in (tile.same, tile.other))
    sums, shift = same + other, 1  # tau log exp(1 / tau): the sums are divided by exp(1 / tau)
    decoupled = t * (sums / (views * (n - own))).log() + shift
    prior = -t * share.amin(2).log()
    rarest = share.masked_fill(own_class, math.inf).amin(2)  # of the other classes
    foreign = n - count[y].unsqueeze(1)  # images of other classes, [b, 1]
    excluded = t * (other / (views * foreign)).log() + shift + t * (foreign / (n - own) / rarest).log()
    certified, ntxent = (torch.full_like(decoupled, math.nan) for _ in range(2))  # a population is not a batch
    if own:
        certified = t * certified_mean(sums, n, views, t)
        ntxent = t * ((sums + tile.positive) / (views * n - 1)).log() + shift
    return {
        "repel": repel,
        "repel_cosine": cosine,
        "margin_gap": to_every.amax(2) - repel,
        "logsumexp_gap": equal_shares - to_every.amax(2),
        "prior_gap": by_share + prior - equal_shares,
        "jensen_gap": decoupled - by_share,
        "repel_decoupled": decoupled,
        "prior": prior,
        "repel_excluded": excluded,
        "repel_certified": certified,
        "repel_ntxent": ntxent,
        "q_same": same / sums,
        "nscl_gap": torch.log1p(same / other),
    }


def _fields(sample: Sample, mean: dict[str, Tensor], tau: Tensor, lam: float, without: int | None) -> dict[str, Tensor]:
    """The fields of ``Bound``, each [T] or one number for all temperatures, from the means of ``_values_per_view``."""
    a, b_class, share, _ = sample.moments(without)
    count, total, *_ = sample.without(without)
    b = share @ b_class
    length = b_class.clamp(min=0).sqrt()
    supervised = -b + lam * mean["repel"]
    supervised_cosine = -share @ length + lam * mean["repel_cosine"]
    upper_bound = -b + lam * (mean["repel_decoupled"] + mean["prior"])
    class_excluded = -b + lam * mean["repel_excluded"]
    cosine_prototypes = upper_bound + lam * (1 - (total / count.unsqueeze(1)).norm(dim=1).min())
    certified = -b + lam * (mean["repel_certified"] - tau * share.min().log())
    unchanged = ("repel_decoupled", "repel_ntxent", "repel_certified", "prior", *GAPS, "q_same", "nscl_gap")
    return {name: mean[name] for name in unchanged} | {
        "supervised": supervised,
        "attract": -a,
        "b2": a - b,
        "upper_bound": upper_bound,
        "slack": upper_bound - supervised,
        "class_excluded": class_excluded,
        "class_excluded_slack": class_excluded - supervised,
        "cosine_prototypes": cosine_prototypes,
        "cosine_prototypes_slack": cosine_prototypes - supervised_cosine,
        "certified": certified,
        "certified_slack": certified - supervised,
    }

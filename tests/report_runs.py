"""Run folders as ``scclr train`` leaves them, with numbers that a test chooses."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from scclr.config.compose import parse, plan

PARTS = ("mean_norm2", "s_b", "b2", "v_aug")
METRIC = "logreg-v1/top1"
QUICK = ("seed", "alpha", "loss.temperature")  # words that need not be composed, which takes long


@cache
def composed(words: tuple[str, ...]) -> Any:
    (point,) = plan(parse(list(words))).points
    return point.config


def bound(step: int, alpha: float) -> dict[str, float]:
    """The logged bound, whose slack is the weight of repulsion times the sum of its gaps."""
    gaps = dict(
        zip(("margin_gap", "logsumexp_gap", "prior_gap", "jensen_gap"), (step / 100, 0.4, 0.1, 0.2), strict=True)
    )
    values = {**gaps, "slack": sum(gaps.values()) * (1 - alpha) / alpha, "class_excluded_slack": 0.5}
    return {f"pretrain/bound/{name}": value for name, value in values.items()}


def write_run(
    folder: Path, *words: str, metrics: Mapping[str, float], theory: bool = False, rows: int = 0, **parts: Any
) -> Path:
    """A finished run of a command line below ``folder``; returns its folder.

    Args:
        theory: whether the forecast and the stage theory have left their numbers.
        rows: of ``metrics.jsonl``.
        parts: more entries of ``result.json``.
    """
    typed = dict(word.split("=", 1) for word in words)
    config = deepcopy(composed(tuple(word for word in words if word.split("=")[0] not in QUICK)))
    config.seed = int(typed.get("seed", 0))
    if "alpha" in typed:
        config.alpha = config.loss["alpha"] = float(typed["alpha"])
    if "loss.temperature" in typed:
        config.loss["temperature"] = float(typed["loss.temperature"])
    plain = asdict(config)
    group, own = (sha256(json.dumps({**plain, "seed": seed}).encode()).hexdigest()[:8] for seed in (None, config.seed))
    directory = folder / f"{config.loss_name}-alpha{config.alpha}-seed{config.seed}-{own}"
    directory.mkdir(parents=True)
    alpha = config.last_alpha
    shares = dict(zip(PARTS, (0.6 - 0.3 * alpha, 0.1 + 0.1 * alpha, 0.1, 0.2 + 0.1 * alpha), strict=True))
    measured = {f"theory/{space}/{name}": value for space in "zh" for name, value in shares.items()}
    log = [
        {
            "step": step,
            "pretrain/epoch": step / 10,
            "pretrain/loss": 6 - step / 50,
            "pretrain/attract": -1 - alpha - step / 100,
            "pretrain/repel": 5 + alpha - step / 100,
            "pretrain/images_per_second": 1000.0 + step,
            "pretrain/alignment": 1 - alpha / 2,
            "pretrain/uniformity": -3 + alpha,
            "pretrain/gradient/attract": 0.3,
            "pretrain/gradient/repel": 0.1 + step / 1000,
            **({"pretrain/knn": 0.5 + step / 1000, **bound(step, alpha)} if step % 20 == 0 else {}),
        }
        for step in range(10, 10 * rows + 1, 10)
    ]
    result = {
        "run": directory.name,
        "group": f"{config.loss_name}-alpha{config.alpha}-{group}",
        "metrics": {**metrics, **(measured if theory else {}), **({"theory/alpha_c": 0.6} if theory else {})},
        "forecast": {"r_max": 0.8, "alpha_col": 0.83, "alpha_mis": 0.05, "alpha_mis_exact": True} if theory else None,
        "validation": {METRIC.split("/")[0]: 0.9},
        "left_out": {},
        "last": {key: value for key, value in log[-1].items() if key != "step"} if log else {},
        "seconds": {"pretrain": 50.0, "probe": 2.0, "theory": 1.0, "total": 55.0 + config.seed},
        "config": plain,
        "machine": {"device": "cpu", "gpu": None, "cpu": "AMD EPYC", "cores": 2, "threads": 1},
        "versions": {"scclr": "0.1.0"},
        **parts,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(plain))))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (directory / "result.json").write_text(json.dumps(result))
    return directory

"""Is the alpha at which everything collapses predicted before training? Judges conf/experiment/collapse*.yaml.

Three strengths of augmentation, 96 runs of 10 s on one core, which two cores do in a quarter of an hour:

    scclr train -m experiment=collapse_strong loss.temperature=0.2,0.5 alpha=0.49,0.52,0.55,0.58,0.61 seed=0,1,2
    scclr train -m experiment=collapse loss.temperature=0.2,0.5 alpha=0.56,0.60,0.64,0.68,0.72,0.76 seed=0,1,2
    scclr train -m experiment=collapse_weak loss.temperature=0.2,0.5 alpha=0.84,0.88,0.92,0.96,0.99 seed=0,1,2
    python scripts/judge_collapse.py runs/collapse

The prediction: alpha_col = 1 / (2 - r_max), where r_max is the largest correlation between views of what is linear in
the pixels and in the untrained features. It is the same at every temperature, and lower for stronger augmentation. It
is recomputed here from each run's configuration, once with pixels, as a run is warned, and once from h alone.

The observation: half-way between the largest alpha up to which |mu|^2 <= 0.9 and the next one, by seed.

The criterion: means over seeds differ by at most 0.05 in all settings but one in six, and temperature moves no
threshold by more than 0.03.

The forecast was chosen on other runs than it is judged by:

    scclr train -m experiment=collapse name=collapse_check augment.jitter=0 loss.temperature=0.2,0.5 \
        alpha=0.77,0.81,0.85,0.89,0.93 seed=3,4,5
    scclr train -m experiment=collapse name=collapse_check augment.crop_scale=[0.2,1.0] augment.rotation=30 \
        augment.brightness=0.4 augment.contrast=0.4 loss.temperature=0.2,0.5 alpha=0.56,0.60,0.64,0.68,0.72 seed=3,4,5
    python scripts/judge_collapse.py runs/collapse_check collapse_check

The arguments are the folder of the runs and the name of the results, by default collapse. Writes
scripts/results/NAME.csv, with one row per run, and NAME.png.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from scclr.components import make_loss, make_model
from scclr.config.build import build
from scclr.config.resolve import resolve
from scclr.config.schema import TrainConfig
from scclr.theory import augmentation_correlations, collapse_threshold
from scclr.theory.embed import embed
from scclr.theory.forecast import FORECAST_IMAGES, FORECAST_VIEWS, forecast_collapse

RESULTS = Path(__file__).parent / "results"
COLLAPSED, TOLERANCE, LARGEST_SHIFT = 0.9, 0.05, 0.03


def predictions(config: TrainConfig) -> tuple[float, float]:
    """alpha_col from h and pixels, and from h alone, of the untrained encoder of a run with this configuration."""
    torch.manual_seed(config.seed)
    splits, augment = build("dataset", config.dataset).load(), build("augment", config.augment)
    model = make_model(config, splits.mean, splits.std, image_size=splits.train.images.shape[-1])
    form, batch = make_loss(config, len(splits.classes)).logsumexp_form(), config.pretrain.batch_size
    assert form is not None
    forecast = forecast_collapse(model, splits.pretrain, augment, form, batch=batch, seed=config.seed)
    few = splits.pretrain[slice(0, FORECAST_IMAGES // batch * batch)]
    h, _ = embed(model.train(), few, augment, FORECAST_VIEWS, batch, seed=config.seed)
    return forecast.alpha_col, collapse_threshold(augmentation_correlations(h)[0].item())


def read(folder: Path) -> list[dict[str, Any]]:
    """One row for each finished run."""
    rows, known = [], {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        config = resolve(OmegaConf.create(result["config"]))
        setting = json.dumps([config.augment, config.encoder, config.dataset, config.seed], sort_keys=True)
        if setting not in known:
            known[setting] = predictions(config)
        recipe = {key: config.augment[key] for key in ("crop_scale", "rotation", "jitter", "brightness")}
        metrics = result["metrics"]
        rows.append(
            {
                "augment": " ".join(f"{key}={value}" for key, value in recipe.items()),
                "temperature": config.loss["temperature"],
                "alpha": config.alpha,
                "seed": config.seed,
                "mean_norm2": metrics["theory/z/mean_norm2"],
                "v_aug": metrics["theory/z/v_aug"],
                "predicted": known[setting][0],
                "predicted_h_alone": known[setting][1],
                "seconds": result["seconds"]["total"],
            }
        )
    if not rows:
        raise SystemExit(f"no result.json below {folder}")
    return rows


def observed(points: list[tuple[float, float]]) -> float | None:
    """The threshold in one seed's (alpha, |mu|^2), or None if it is outside the alphas that were run."""
    points = sorted(points)
    for (below, _), (above, size) in pairwise(points):
        if size > COLLAPSED:
            return None if points[0][1] > COLLAPSED else (below + above) / 2
    return None


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each setting, with means over seeds."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["augment"], row["temperature"]].append(row)
    verdicts = []
    for (augment, temperature), members in sorted(groups.items()):
        seeds = sorted({row["seed"] for row in members})
        found = [observed([(r["alpha"], r["mean_norm2"]) for r in members if r["seed"] == seed]) for seed in seeds]
        inside = [value for value in found if value is not None]
        least, most = min(r["alpha"] for r in members), max(r["alpha"] for r in members)
        outside = [most if max(r["mean_norm2"] for r in members if r["seed"] == s) <= COLLAPSED else least
                   for s, value in zip(seeds, found, strict=True) if value is None]  # fmt: skip
        verdict = {"augment": augment, "temperature": temperature, "n": len(seeds), "outside": len(outside)}
        verdict["observed"] = statistics.mean(inside + outside)
        for name in ("predicted", "predicted_h_alone"):
            verdict[name] = statistics.mean(next(r[name] for r in members if r["seed"] == seed) for seed in seeds)
        verdict["by_seed"] = found
        verdicts.append(verdict)
    return verdicts


def report(verdicts: list[dict[str, Any]]) -> None:
    """Print the verdict."""
    passed = dict.fromkeys(("predicted", "predicted_h_alone"), 0)
    for v in verdicts:
        print(f"{v['augment']}  temperature {v['temperature']:g}  n = {v['n']}")
        bound = "  (a bound: for some seeds the threshold is outside these alphas)" if v["outside"] else ""
        print(f"  observed                 {v['observed']:.3f}  {v['by_seed']}{bound}")
        for name in passed:
            error = v["observed"] - v[name]
            passed[name] += abs(error) <= TOLERANCE
            print(f"  {name:<24} {v[name]:.3f}  off by {error:+.3f}  {'pass' if abs(error) <= TOLERANCE else 'FAIL'}")
    shifts = []
    for augment in sorted({v["augment"] for v in verdicts}):
        values = [v["observed"] for v in verdicts if v["augment"] == augment]
        shifts.append(max(values) - min(values))
        print(f"{augment}: temperature moves the threshold by {shifts[-1]:.3f}")
    for name, count in passed.items():
        holds = 6 * count >= 5 * len(verdicts)
        print(f"{name}: {count} of {len(verdicts)} settings within {TOLERANCE}: {'HOLDS' if holds else 'FAILS'}")
    print(f"temperature: largest shift {max(shifts):.3f}: {'HOLDS' if max(shifts) <= LARGEST_SHIFT else 'FAILS'}")


def plot(rows: list[dict[str, Any]], verdicts: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({row["augment"] for row in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.4), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for temperature, colour in zip(sorted({row["temperature"] for row in rows}), ("C0", "C1"), strict=False):
            mine = [row for row in rows if row["augment"] == kind and row["temperature"] == temperature]
            for seed in sorted({row["seed"] for row in mine}):
                points = sorted((row["alpha"], row["mean_norm2"]) for row in mine if row["seed"] == seed)
                label = f"temperature {temperature:g}" if seed == mine[0]["seed"] else None
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, lw=0.8, label=label)
        one = next(v for v in verdicts if v["augment"] == kind)
        axis.axvline(one["predicted"], color="black", label="predicted")
        axis.axvline(one["predicted_h_alone"], color="black", ls=":", label="predicted from h alone")
        axis.axhline(COLLAPSED, color="grey", lw=0.5)
        axis.set(xlabel="alpha", ylim=(-0.03, 1.03), title=kind)
        axis.title.set_fontsize(7)
    axes[0][0].set_ylabel("|mu|^2 of the trained embeddings")
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    rows, name = read(Path(sys.argv[1])), sys.argv[2] if len(sys.argv) == 3 else "collapse"
    verdicts = judge(rows)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, verdicts, RESULTS / f"{name}.png")
    report(verdicts)


if __name__ == "__main__":
    main()

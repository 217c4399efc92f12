"""How the result of a run is shown."""

import shlex
from pathlib import Path
from typing import Any

from scclr.config.errors import require
from scclr.config.schema import TrainConfig
from scclr.run.files import read_json

SWEEP = "scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2"
TITLES = {"": "pretrained", "baseline/untrained/": "untrained encoder", "baseline/pixels/": "raw pixels"}


def read_result(directory: Path) -> dict[str, Any]:
    """The ``result.json`` of a run folder.

    Raises:
        UserError: it is not what a run writes.
    """
    path = directory / "result.json"
    result = read_json(path)
    require({"metrics", "config", "seconds"} <= result.keys(), f"{path}: damaged; type overwrite=true to run it anew")
    return result


def validation_accuracy(result: dict[str, Any]) -> float | None:
    """What a sweeper may maximize: the accuracy of the probe, or else of kNN, on the validation split."""
    found: float | None = result.get("validation", {}).get("probe/logreg", result.get("last", {}).get("pretrain/knn"))
    return found


def summary(result: dict[str, Any], directory: Path, note: str) -> str:
    """The table at the end of a run.

    Args:
        note: what to type next.
    """
    metrics, lines = result["metrics"], [""]
    columns = [name for name in metrics if name.endswith("top1") and not name.startswith("baseline/")]
    if columns:
        lines.append(f"{'test accuracy, %':<18}" + "".join(f"{name:>20}" for name in columns))
        groups = [name.removeprefix(columns[0]) for name in metrics if name.startswith(f"{columns[0]}/")]
        for prefix, title in TITLES.items():
            for group in ("", *groups):  # all, and of a long tail: /many, /medium, /few
                values = (metrics[f"{prefix}{name}{group}"] for name in columns)
                label = f"  {group[1:]} images" if group else title
                lines.append(f"{label:<18}" + "".join(f"{100 * value:>20.2f}" for value in values))
        lines.append("")
    seconds = {"pretraining" if name == "pretrain" else name: value for name, value in result["seconds"].items()}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total" and value > 0)
    lines += [f"run   {directory}", f"time  {seconds['total']:.0f} s: {spent}", f"next  {note}"]
    return "\n".join(lines)


def hint(config: TrainConfig, directory: Path) -> str:
    """The command to type next."""
    if "probe" not in config.stages:
        encoder = str(directory) if "pretrain" in config.stages else config.init_from
        return f"scclr train stages=[probe] {shlex.quote(f'init_from={encoder}')}"
    if config.tracking.mode == "offline":
        return f"{SWEEP}\n      wandb sync {shlex.quote(str(directory))}/wandb/offline-run-*"
    return SWEEP

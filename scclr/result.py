"""What ``result.json`` holds beside the metrics, and how a result is shown."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scclr.config import TrainConfig
from scclr.datasets.longtail import GROUPS


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers were made."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Of what computes, and the git revision of this source tree, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = None
    packages = ("scclr", "torch", "torchvision", "hydra-core", "numpy", "scikit-learn", "wandb")
    return {"python": platform.python_version(), "git": revision, **{name: version(name) for name in packages}}


def summary(result: dict[str, Any], directory: Path, note: str) -> str:
    """The table at the end of a run."""
    metrics = result["metrics"]
    columns = [
        name for name in metrics if not name.startswith(("baseline/", "theory/")) and name.split("/")[-1] not in GROUPS
    ]
    rows = {"pretrained": "", "untrained encoder": "baseline/untrained/", "raw pixels": "baseline/pixels/"}
    lines = [""]
    if columns:
        lines.append(f"{'test accuracy, %':<18}" + "".join(f"{name:>20}" for name in columns))
        for title, prefix in rows.items():
            lines.append(f"{title:<18}" + "".join(f"{100 * metrics[prefix + name]:>20.2f}" for name in columns))
            for group in (group for group in GROUPS if f"{columns[0]}/{group}" in metrics):
                values = "".join(f"{100 * metrics[f'{prefix}{name}/{group}']:>20.2f}" for name in columns)
                lines.append(f"{f'  {group} images':<18}{values}")
        lines.append("")
    seconds = {"pretraining" if name == "pretrain" else name: value for name, value in result["seconds"].items()}
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name != "total")
    lines += [f"run   {directory}", f"time  {seconds['total']:.0f} s: {spent}", f"next  {note}"]
    return "\n".join(lines)


def hint(config: TrainConfig) -> str:
    """The command to type next."""
    if "probe" not in config.stages:
        encoder = config.directory if "pretrain" in config.stages else config.init_from
        return f"scclr train stages=[probe] init_from={encoder}"
    if config.tracking.mode == "offline":
        return f"scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2\n      wandb sync {config.directory}/wandb/offline-run-*"
    return "scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2"

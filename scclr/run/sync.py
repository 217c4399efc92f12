"""The upload of W&B runs that were logged offline, by W&B's own command ``wandb sync``."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from scclr.config.errors import require
from scclr.run.lock import is_locked
from scclr.run.wandb_environment import wandb_environment

OFFLINE_RUN = "offline-run-"  # what the names of their folders begin with
SYNCED = ".synced"  # what W&B appends to the name of a file for a marker beside it, once that is uploaded
HEADER = 7  # bytes of a file without any record
BATCH = 50  # runs for one call of ``wandb sync``, which uploads some of them at once
MARKS_RIGHTLY = (0, 30)  # version of W&B; an older one leaves the marker after an error too
ALIKE = 3  # failures in a row for the same reason, after which no other run is tried


def upload(folders: Sequence[Path]) -> tuple[list[str], bool]:
    """Upload the offline W&B runs in folders and below that have not been uploaded.

    A run whose training works is left for later: W&B would take what there is of it for the whole.

    Returns:
        Lines that say what became of them, and whether none has failed.

    Raises:
        UserError: a folder holds no such runs, there is no key, or W&B's server does not answer.
    """
    known: dict[Path, Path] = {}
    for folder in folders:
        here = [path for path in sorted(folder.rglob("*.wandb")) if path.parent.name.startswith(OFFLINE_RUN)]
        require(len(here) > 0, f"{folder}: no offline W&B run in it or below; give a folder such as runs/default")
        known |= {path.resolve(): path for path in here}
    states: dict[str, list[Path]] = {name: [] for name in ("to do", "uploaded before", "still running", "empty")}
    for path in known.values():
        states[_state(path)].append(path)
    todo, failed = states.pop("to do"), dict[Path, str]()
    if todo:
        from scclr.run.wandb_run import require_access  # which imports wandb

        print(f"uploading {len(todo)} W&B runs to {require_access('', '')}", file=sys.stderr)
        failed = _upload(todo)
    counts = {"uploaded": len(todo) - len(failed), "failed": len(failed)}
    counts |= {name: len(paths) for name, paths in states.items()}
    total = ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "uploaded")
    return [total, *(f"  failed  {path.parent}: {reason}" for path, reason in failed.items())], not failed


def _state(path: Path) -> str:
    if _is_uploaded(path):
        return "uploaded before"
    if is_locked(path.parents[2]):
        return "still running"
    return "empty" if path.stat().st_size <= HEADER else "to do"  # its process was killed


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}{SYNCED}")


def _is_uploaded(path: Path) -> bool:
    return _marker(path).exists()


def _upload(paths: Sequence[Path]) -> dict[Path, str]:
    """Upload files; returns those that are not, with the reason.

    What a call with several files leaves is tried again one by one: a file that W&B cannot read ends the whole call,
    and what is printed does not tell whose error it is.
    """
    failed: dict[Path, str] = {}
    together = tuple(int(part) for part in version("wandb").split(".")[:2]) >= MARKS_RIGHTLY
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        if len(batch) > 1 and together:
            _wandb_sync(batch)
        for path in batch:
            if _is_uploaded(path):
                continue
            reasons = [*failed.values()][-ALIKE:]
            if len(reasons) == ALIKE and len(set(reasons)) == 1:
                rest = [other for other in paths if other not in failed and not _is_uploaded(other)]
                return failed | dict.fromkeys(rest, f"not tried: {reasons[0]}")
            said = _wandb_sync([path])
            if "wandb: ERROR" in said:
                _marker(path).unlink(missing_ok=True)
            if not _is_uploaded(path):
                failed[path] = _reason(said)
    return failed


def _wandb_sync(paths: Sequence[Path]) -> str:
    """Let ``wandb sync`` upload files; returns what it printed. Its exit code does not tell whether it has."""
    with TemporaryDirectory() as folder, wandb_environment(spare=Path(folder)):
        shown = {name: value for name, value in os.environ.items() if name not in ("WANDB_SERVICE", "WANDB_SILENT")}
        command = [sys.executable, "-m", "wandb", "sync", *(str(path.resolve()) for path in paths)]
        done = subprocess.run(
            command, env={**shown, "WANDB_DIR": folder}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    return f"{done.stdout}\n{done.stderr}"


def _reason(said: str) -> str:
    """The last line with an error of what W&B printed, or else its last line."""
    lines = [line.removeprefix("wandb: ").strip() for line in said.splitlines()]
    lines = [line for line in lines if line] or ["W&B has not said why"]
    errors = [line for line in lines if "error" in line.lower() and "error logs at" not in line]
    return re.sub(r"^error:?\s+", "", (errors or lines)[-1], flags=re.IGNORECASE)

"""What torchrun tells a process about its group, in variables of the environment. They are read and checked here only.

Importing this file does not import torch.
"""

import os
from contextlib import suppress
from typing import NamedTuple

from scclr.config.errors import UserError, require

ADVICE = "start with torchrun, or unset WORLD_SIZE"
TASKS = "SLURM_STEP_NUM_TASKS"  # of the processes that one srun started; the shell of a job has none


class Group(NamedTuple):
    """The place of a process among those that torchrun started. The default is that of a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine


def group() -> Group:
    """The place of this process. Without ``WORLD_SIZE`` it is on its own, whatever the other variables say.

    Raises:
        UserError: ``WORLD_SIZE`` is no number of processes, or the other variables do not fit it; or there is none, and
            srun has started several processes, each of which would be the whole run.
    """
    if "WORLD_SIZE" not in os.environ:
        tasks = os.environ.get(TASKS) or "1"
        lone = f"{TASKS}={tasks}: srun started this {tasks} times, and no process knows of the others"
        advice = "type srun --ntasks-per-node=1 torchrun --nproc-per-node=<GPUs> -m scclr train ..., or unset it"
        require(tasks == "1", f"{lone}; {advice} if these are separate runs")
        return Group()
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Group()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    require(not missing, f"WORLD_SIZE={size} without {', '.join(missing)}: {ADVICE}")
    _number("MASTER_PORT", 0, 2**16)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size + 1) if "LOCAL_WORLD_SIZE" in os.environ else 1
    return Group(_number("RANK", 0, size), size, _number("LOCAL_RANK", 0, size), local_size)


def is_main() -> bool:
    """Whether this process speaks for the run. One whose variables are refused does: somebody has to say so."""
    with suppress(UserError):
        return group().rank == 0
    return True


def _number(name: str, least: int, end: float = 10**6) -> int:
    text = os.environ[name]
    valid = text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) < end
    require(valid, f"{name}={text}: not what torchrun sets; {ADVICE}")
    return int(text)

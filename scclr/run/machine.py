"""What a run finds on its machine, and how it sets up memory and kernels there."""

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import scclr
from scclr.config.errors import UserError, one_line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**29
TOO_LARGE = ("DefaultCPUAllocator", "Storage size calculation overflowed")  # in PyTorch's errors about a CPU's memory
PACKAGES = ("scclr", "torch", "torchvision", "hydra-core", "numpy", "scikit-learn", "wandb")


def available_cores() -> int:
    """The number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Bytes of main memory that this process may use: those of the machine, or fewer in a container."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(path.read_text()))
    return min(limits)


def keep_freed_memory() -> None:
    """Let glibc keep up to 512 MiB of freed memory for the next tensors.

    Its own thresholds start at 128 KiB and grow with the blocks that are freed. A block that went back to the kernel
    is mapped again page by page, and each page is cleared: on a CPU that can take longer than the operation that fills
    the block.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def memory_error(error: Exception) -> UserError | None:
    """What to tell the user if ``error`` says that there is too little memory, of a GPU or of the machine; else None.

    A CPU has no error of its own for it in PyTorch.
    """
    said = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not said and not (isinstance(error, RuntimeError) and any(words in str(error) for words in TOO_LARGE)):
        return None
    found = re.search(r"you tried to allocate (\d+) bytes", str(error))
    detail = f"too little memory for {int(found[1]) / 1e9:,.1f} GB at once" if found else one_line(error)
    advice = "type pretrain.micro_batch=64, which keeps the gradient, or a smaller pretrain.batch_size"
    return UserError(f"{detail or 'too little memory'}; {advice}")


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """If ``on``, use only kernels that give the same bits on the same machine with the same number of threads.

    cuBLAS reads its setting from the environment when it starts.

    Raises:
        RuntimeError: an operation has no such kernel; PyTorch names it.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled: Any = torch.utils.deterministic
    older = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        filled.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(on)
    # Filling would show that uninitialized memory is read, at the cost of a pass over every new tensor.
    filled.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(older[0])
        torch.backends.cudnn.benchmark, filled.fill_uninitialized_memory = older[1:]


def describe(device: torch.device) -> dict[str, Any]:
    """The machine on which a result was computed."""
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that compute, and the git revision if the package is run from one."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "git": _revision(Path(scclr.__file__).parents[1]), **packages}


def _revision(source: Path) -> str | None:
    """The revision of the repository whose top folder is ``source``; None inside another repository, or in none."""
    if _git(source, "rev-parse", "--show-toplevel") != str(source.resolve()):
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

"""What a run finds on its machine, and how it sets up memory and kernels there."""

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import scclr
from scclr.config.errors import UserError, one_line
from scclr.run.torchrun import group

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**29
AT_ONCE = "SCCLR_POINTS_AT_ONCE"  # in the environment of a sweep's points: how many of them share the machine
# In errors of PyTorch that are about memory, and have no type of their own: of a CPU, of CUDA's libraries, of NCCL.
TOO_LARGE = (
    r"DefaultCPUAllocator|Storage size calculation overflowed|CUDA error: out of memory|Cuda failure.*out of memory"
    r"|CU[A-Z]+_STATUS_([A-Z_]*_)?ALLOC(ATION)?_FAILED"
)
SMALLER_STEP = "type pretrain.micro_batch=64, which keeps the gradient, or a smaller pretrain.batch_size"
T = TypeVar("T")
PACKAGES = ("scclr", "torch", "torchvision", "hydra-core", "numpy", "scikit-learn", "wandb")


def available_cores() -> int:
    """The number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """This process's share of the cores, beside those that torchrun started here and other points of its sweep."""
    return max(1, available_cores() // (group().local_size * int(os.environ.get(AT_ONCE, "1"))))


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


def memory_error(error: BaseException, advice: str = SMALLER_STEP) -> UserError | None:
    """What to tell the user if ``error`` says that a GPU or the machine has too little memory; else None."""
    said = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not said and not (isinstance(error, RuntimeError) and re.search(TOO_LARGE, str(error))):
        return None
    found = re.search(r"you tried to allocate (\d+) bytes", str(error))
    detail = f"too little memory for {int(found[1]) / 1e9:,.1f} GB at once" if found else one_line(error)
    return UserError(f"{detail or 'too little memory'}; {advice}")


@contextmanager
def if_memory_lacks(advice: str) -> Iterator[None]:
    """Give ``advice`` if there is too little memory for what is done meanwhile.

    Raises:
        UserError: there is too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if known := memory_error(error, advice):
            raise known from error
        raise


@contextmanager
def deterministic_kernels(on: bool, *, warn_only: bool = False) -> Iterator[None]:
    """If ``on``, use only kernels that give the same bits on the same machine with the same number of threads.

    cuBLAS reads its setting from the environment when it starts, so it is set even if ``on`` is false at first.

    Raises:
        RuntimeError: an operation has no such kernel; PyTorch names it. With ``warn_only`` that is a warning.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch's own choice on an H100
    filled: Any = torch.utils.deterministic
    enabled, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    older = torch.backends.cudnn.benchmark, filled.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    # Filling would show that uninitialized memory is read, at the cost of a pass over every new tensor.
    filled.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warned)
        torch.backends.cudnn.benchmark, filled.fill_uninitialized_memory = older


@contextmanager
def pinned_arithmetic() -> Iterator[None]:
    """Compute meanwhile what gives the same numbers again on the same machine: for the forecast, features and theory.

    This pins, and puts back at the end: matrix products and cuDNN's convolutions in float32 instead of TF32, which
    PyTorch allows cuDNN by default; cuDNN's algorithms without ``benchmark``, which chooses by timings; and kernels
    that are deterministic where PyTorch has such. Where it has none it warns, unless ``deterministic_kernels`` refuses.

    Pretraining is outside, also with ``pretrain.precision=fp32``: there cuDNN uses TF32 on GPUs that have it, as
    PyTorch does by default.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = matmul.allow_tf32, cudnn.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with deterministic_kernels(True, warn_only=not strict):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = older


def decompose(function: Callable[[Tensor], T], x: Tensor) -> T:
    """``function(x)``, such as ``torch.linalg.eigh``; computed on the CPU where CUDA's solver fails.

    ``function`` gives a tensor or a tuple of tensors. They are on the device of ``x``.

    Raises:
        LinAlgError: the CPU's solver does not converge either.
    """
    try:
        return function(x)
    except RuntimeError as error:
        of_solver = isinstance(error, torch.linalg.LinAlgError) or "cusolver" in str(error).lower()
        if x.device.type == "cpu" or not of_solver:
            raise
    found: Any = function(x.cpu())
    parts: Any = (part.to(x.device) for part in ([found] if isinstance(found, Tensor) else found))
    return next(parts) if isinstance(found, Tensor) else type(found)(parts)


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

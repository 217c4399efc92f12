"""The processes of ``torchrun``: who this one is, its share of a batch, and what all of them hold together.

Dimensions: W processes; B images of a step here, G = W B in all; P embedding dimensions.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size``; alone without torchrun."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, logs and evaluates."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a global batch [G, ...], a view [B, ...]."""
        return batch.chunk(self.size)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        """Everybody's ``x`` [B, ...] in the order of ranks, [G, ...]; differentiable.

        The gradient sums what every process did with its copy, so that gradients averaged over processes, as
        ``DistributedDataParallel`` does, are those of the mean of the processes' losses.
        """
        return x if self.size == 1 else _Gather.apply(x)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def replicate(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over processes, and on CUDA batch statistics shared by them."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        if device.type == "cuda":  # there is no such layer for a CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """(the world of the processes that torchrun started, this process's own device); left at the end."""
    if launched() == 1:
        yield World(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()

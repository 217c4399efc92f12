"""The processes of ``torchrun``: who this one is, its share of a batch, and what all of them hold together.

Dimensions: W processes; B images of a step here, G = W B in all; P embedding dimensions.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from scclr.config import UserError, one_line

LOST = ("gloo", "NCCL", "Connection")  # in what a collective says when another process is gone
GRACE = 2.0  # seconds; that process is the one that the launcher should name


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

    def most(self, value: int) -> int:
        """The greatest ``value`` over processes, by way of their hosts: no device is waited for."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def replicate(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over processes and batch statistics shared by them."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:  # which PyTorch's refuses
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.forward = partial(_synchronised, module, self)  # type: ignore[method-assign]
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _synchronised(norm: _BatchNorm, world: World, x: Tensor) -> Tensor:
    """What ``norm`` makes of the batch [G, C, ...] of which ``x`` [B, C, ...] is this process's part."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    y, mean, variance = _BatchNormOfAll.apply(x, norm.weight, norm.bias, norm.eps, world)
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    n = x.numel() // x.shape[1] * world.size
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
    return y


class _BatchNormOfAll(torch.autograd.Function):
    """Batch normalisation by the statistics of all processes' equal parts, and these statistics.

    With mean m_r and variance v_r of each part, the batch's are m = mean(m_r) and v = mean(v_r + (m_r - m)^2). With
    x^ = (x - m) / s, s^2 = v + eps, dy the gradient and means over the batch,
    dx = w / s (dy - mean(dy) - x^ mean(dy x^)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World) -> Any:
        own = torch.batch_norm_update_stats(x, None, None, 0.0)  # [C] twice; 30 times as fast as torch.var_mean
        means, variances = world.gather(torch.stack(own).unsqueeze(0)).unbind(1)  # [W, C]
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.world = eps, world
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        # as if the statistics were constants: w / s dy, sum(dy x^), sum(dy), in one pass
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        n = x.numel() // x.shape[1] * ctx.world.size
        all_dw, all_db = ctx.world.sum(torch.stack([dw, db])) / n  # means over the batch
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse.square() * all_dw
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        dx.addcmul_(x, slope.view(shape), value=-1)
        dx.sub_((weight * inverse * all_db - slope * mean).view(shape))
        return dx, dw, db, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        time.sleep(GRACE)
        raise UserError(f"another process of this run ended ({one_line(error)})") from error
    dist.destroy_process_group()  # after an error it might wait for those who are gone

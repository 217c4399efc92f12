"""The processes of ``torchrun`` that train one model together.

Without a process group there is one process: every function here then does what one process needs, which is mostly
nothing. Dimensions: W processes; B images of a step in this process, G = W B images in all.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from scclr.config.errors import UserError, one_line, require
from scclr.run import torchrun

LOST = ("gloo", "NCCL", "Connection")  # words in the error of a collective when another process has ended
GRACE = 2.0  # seconds in which the launcher notices the process that ended first, and names that one


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes in the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def shard(batch: Tensor) -> Tensor:
    """This process's part [B, ...] of a global batch [G, ...], as a view."""
    return batch.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The ``x`` [B, ...] of all processes in the order of their ranks, [G, ...]; differentiable.

    The gradient is the sum over what every process did with its copy. So gradients that are averaged over processes, as
    ``DistributedDataParallel`` does, are those of the mean of the processes' losses.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(value: int) -> int:
    """The greatest ``value`` over processes. It travels between the hosts, so no device is waited for."""
    if world_size() == 1:
        return value
    values = torch.tensor([value])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def replicate(model: nn.Module) -> nn.Module:
    """``model`` with gradients averaged over processes, and batch normalization by the statistics of all of them.

    CUDA takes ``torch.nn.SyncBatchNorm``, which exists for GPUs only; other devices take ``_synchronized`` below.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.forward = partial(_synchronized, module)  # type: ignore[method-assign]
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def _synchronized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What ``norm`` makes of the batch [G, C, ...] of which ``x`` [B, C, ...] is this process's part."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    if not norm.training:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    y, mean, variance = _BatchNormOfAll.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        n = x.numel() // x.shape[1] * world_size()
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (n / (n - 1)), norm.momentum)
    return y


class _BatchNormOfAll(torch.autograd.Function):
    """Batch normalization by the statistics of all processes' equal parts, and these statistics.

    With the mean m_r and the variance v_r of each part, those of the batch are m = mean(m_r) and
    v = mean(v_r + (m_r - m)^2). With x^ = (x - m) / s, s^2 = v + eps, the gradient dy, and means over the batch,
    dx = w / s (dy - mean(dy) - x^ mean(dy x^)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        own = torch.batch_norm_update_stats(x, None, None, 0.0)  # [C] twice; 30 times as fast as torch.var_mean
        means, variances = gather(torch.stack(own).unsqueeze(0)).unbind(1)  # [W, C]
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        # With the statistics taken as constants: w / s dy, sum(dy x^) and sum(dy), in one pass.
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        n = x.numel() // x.shape[1] * world_size()
        all_dw, all_db = all_reduce_sum(torch.stack([dw, db])) / n  # means over the batch
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse.square() * all_dw
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        dx.addcmul_(x, slope.view(shape), value=-1)
        dx.sub_((weight * inverse * all_db - slope * mean).view(shape))
        return dx, dw, db, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows :][: ctx.rows]


def launched_processes() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        UserError: as ``torchrun.group``.
    """
    return torchrun.group().size


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The group of the processes that torchrun started, left at the end; gives this process's own device.

    Raises:
        UserError: there is no device for this process, the processes do not find each other, or another one ended.
    """
    if launched_processes() == 1:
        yield device
        return
    if device.type == "cuda":
        number, devices = torchrun.group().local_rank, torch.cuda.device_count()
        require(number < devices, f"there are {devices} CUDA devices here: type torchrun --nproc-per-node={devices}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (dist.DistError, ValueError) as error:
        meeting = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(f"{meeting}: the processes do not meet there ({one_line(error)})") from error
    try:
        yield device
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        time.sleep(GRACE)
        raise UserError(f"another process of this run ended ({one_line(error)})") from error
    dist.destroy_process_group()  # not after an error: it might wait for the processes that ended

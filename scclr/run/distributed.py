"""The processes of ``torchrun`` that train one model together.

Without a process group there is one process: every function here then does what one process needs, which is mostly
nothing. Dimensions: W processes; B images of a step in this process, G = W B images in all.
"""

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from scclr.run.machine import memory_error

LOST = ("gloo", "NCCL", "Connection")  # words in the error of a collective when another process has ended
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before PyTorch 2.14
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
    """Wait until every process is here. No device is waited for, nor does NCCL guess one."""
    all_reduce_max(0)


@contextmanager
def held_by_main(context: AbstractContextManager[Any]) -> Iterator[None]:
    """``context``, which the main process enters before any other goes on."""
    with context if is_main() else nullcontext():
        barrier()
        yield


def replicate(model: nn.Module) -> nn.Module:
    """``model`` with gradients averaged over processes, and batch normalization by the statistics of all of them.

    All processes begin with the weights and buffers of the main one. Later no buffer is sent: batch normalization moves
    its statistics in the same way in every process, and so must other layers that have buffers.
    """
    if world_size() == 1:
        return model
    synchronized = torch.compiler.disable(_synchronized)  # its kernels and collectives have no traced form
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(synchronized, module)  # type: ignore[method-assign]
    share_buffers(model)
    device = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **options)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the main one, such as the running statistics of batch normalization."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _synchronized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What ``norm`` makes of the batch [G, C, ...] of which ``x`` [B, C, ...] is this process's part.

    ``torch.nn.SyncBatchNorm`` computes the same on GPUs, but waits for the device three times in each forward pass.
    """
    if not norm.training:
        of_batch = norm.running_mean is None
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, of_batch, eps=norm.eps)
    width = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[1], dtype=width) if norm.weight is None else norm.weight
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
    function = _BatchNormOnCuda if x.device.type == "cuda" else _BatchNormOfAll
    y, (mean, variance) = function.apply(_dense(x), weight, bias, norm.eps)
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share: Any = norm.momentum
        if share is None:  # the mean over all batches
            share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
    return y


def _dense(x: Tensor) -> Tensor:
    """``x`` itself in channels_last or contiguous, else a contiguous copy."""
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _BatchNormOfAll(torch.autograd.Function):
    """Batch normalization by the statistics of all processes' equal parts; also their mean and unbiased variance.

    With the mean m_r and the variance v_r of each part, those of the batch are m = mean(m_r) and
    v = mean(v_r + (m_r - m)^2). With x^ = (x - m) / s, s^2 = v + eps, the gradient dy, and means over the batch,
    dx = w / s (dy - mean(dy) - x^ mean(dy x^)). Of narrower types it is computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.batch_norm_update_stats(wide, None, None, 0.0)  # [C] twice; 30 times as fast as torch.var_mean
        means, variances = gather(torch.stack(own).unsqueeze(0)).unbind(1)  # [W, C]
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        y = F.batch_norm(wide, mean, variance, weight, bias, eps=eps).to(x.dtype)
        n = x.numel() // x.shape[1] * world_size()
        moved = torch.stack([mean, variance * (n / (n - 1))])
        ctx.mark_non_differentiable(moved)
        return y, moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        wide, dy = (tensor.to(mean.dtype) for tensor in (x, dy))
        # With the statistics taken as constants: w / s dy, sum(dy x^) and sum(dy), in one pass.
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            dy, wide, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        n = x.numel() // x.shape[1] * world_size()
        all_dw, all_db = all_reduce_sum(torch.stack([dw, db])) / n  # means over the batch
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse.square() * all_dw
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        dx.addcmul_(wide, slope.view(shape), value=-1)
        dx.sub_((weight * inverse * all_db - slope * mean).view(shape))
        return dx.to(x.dtype), dw, db, None


class _BatchNormOnCuda(torch.autograd.Function):
    """``_BatchNormOfAll`` by the kernels of ``torch.nn.SyncBatchNorm``, which exist for GPUs only.

    They take bfloat16 or float16 beside weights in float32, and keep channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        own = torch.batch_norm_stats(x, eps)  # mean and 1 / s, [C] each, float32
        means, inverses = gather(torch.stack(own).unsqueeze(0)).unbind(1)  # [W, C]
        counts = torch.full((len(means),), x.numel() // x.shape[1], dtype=means.dtype, device=x.device)
        moved = torch.zeros(2, len(weight), dtype=means.dtype, device=x.device)  # by momentum 1: the batch's own
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, moved[0], moved[1], 1.0, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.int())
        ctx.mark_non_differentiable(moved)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps), moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        dy = _dense(dy)
        *sums, dw, db = torch.batch_norm_backward_reduce(dy, x, mean, inverse, weight, True, True, True)
        sum_dy, sum_dy_xmu = all_reduce_sum(torch.stack(sums))  # [C] each, of the whole batch
        dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse, weight.to(mean.dtype), sum_dy, sum_dy_xmu, counts)
        return dx, dw, db, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        whole = x.new_empty(world_size() * len(x), *x.shape[1:])
        _all_gather(whole, x.contiguous())
        return whole

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

    The processes leave together after a success. After an error, or after a signal, a process does not wait for the
    others: NCCL's communicators are aborted, because they would keep the interpreter from ending. A process that exits
    with code 75 has failed in torchrun's eyes: with ``--max-restarts`` above 0 it would start the run again, so give 0.

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
        barrier()  # no process takes the group apart while another one still computes
    except BaseException as error:
        if isinstance(error, RuntimeError) and memory_error(error) is None and any(w in str(error) for w in LOST):
            time.sleep(GRACE)
            raise UserError(f"another process of this run ended ({one_line(error)})") from error
        raise
    else:
        dist.destroy_process_group()
    finally:
        if device.type == "cuda" and dist.is_initialized():
            _abort()


def _abort() -> None:
    """End NCCL's communicators without waiting for the other processes. PyTorch 2.6 and later can."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None:
        abort(dist.group.WORLD)

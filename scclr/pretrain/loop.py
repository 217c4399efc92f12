"""Contrastive pretraining: one visible loop.

Dimensions: G images in a step, B of them in this process (B = G with one process), V views of each, P embedding
dimensions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scclr.augment import Augment
from scclr.config.errors import require
from scclr.config.schema import PretrainConfig
from scclr.datasets import ImageSet
from scclr.datasets.loader import Batch, batches, with_view_size
from scclr.losses import GlobalBatch, LossTerms
from scclr.pretrain.metrics import embedding_metrics
from scclr.pretrain.optim import lr_factor, set_lr
from scclr.pretrain.state import LossWindow, TrainState
from scclr.run import distributed
from scclr.run.checkpoint import Checkpoints
from scclr.run.tracking import Log

Evaluation = tuple[int, Callable[[], Mapping[str, float]]]  # epochs between two, 0 for never; gives numbers by name


def pretrain(
    state: TrainState,
    data: ImageSet,
    augment: Augment,
    config: PretrainConfig,
    *,
    seed: int,
    alpha: Callable[[float], float] | None,
    checkpoints: Checkpoints,
    log: Log,
    evaluations: Sequence[Evaluation],
) -> None:
    """Train ``state`` in place, from its step to the last one of ``config.epochs``.

    A step is a function of (state, seed, step): a run that is resumed from a checkpoint is the uninterrupted run, and
    N processes compute what one process would. The host waits for the device only where a row is logged or a checkpoint
    is written.

    Args:
        alpha: the balance as a function of the share of the training, from 0 to 1; None leaves the loss's own.
        evaluations: what is measured and logged now and then.

    Raises:
        NotFiniteError: the loss is not finite; names the step.
        SystemExit: a signal asked the run to stop; a checkpoint was written.
    """
    device, batch_size = data.labels.device, config.batch_size
    steps_per_epoch = len(data) // batch_size
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup * total)
    dtype = precision_dtype(device, config.precision)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    network = distributed.replicate(state.model.train().to(memory_format=memory_format))
    augment, steps = with_view_size(augment, data.images), range(state.step, total)
    rank, world_size = distributed.rank(), distributed.world_size()
    loader = batches(
        data, augment, seed=seed, batch_size=batch_size, steps=steps, rank=rank, size=world_size, say=log.say
    )
    if compiles(device, config.compile):
        network, augment = compiled(network, config.compile), augment.compiled()

    for step, batch in zip(steps, loader, strict=True):
        if config.compile == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # what they returned in the last step is no longer read
        lr = set_lr(state.optimizer, lr_factor(step, total, warmup))
        if alpha is not None:
            state.loss.alpha = alpha(step / max(1, total - 1))
        terms, z = train_step(
            state, network, augment, batch,
            seed=seed, dtype=dtype, memory_format=memory_format, micro_batch=config.micro_batch,
        )  # fmt: skip
        state.window.add(terms)
        state.step = step + 1

        due = [call for every, call in evaluations if every > 0 and state.step % (every * steps_per_epoch) == 0]
        last = state.step == total
        if state.step % config.log_every == 0 or due or last:
            row = {"epoch": state.step / steps_per_epoch, "lr": lr}
            row |= state.window.means(state.step, batch_size)
            for evaluate in due:
                row |= evaluate()
            row |= {} if state.online is None else state.online.top1()
            row |= embedding_metrics(state.loss, z, batch.labels)
            log.row(state.step, row)
            state.window = LossWindow(state.step)
            state.watch.note(row)
            if last or (due and state.step > warmup):
                say_warnings(state, row, z, log)
        if reason := checkpoints.due(state.step):
            checkpoints.save(state.state_dict(), reason)


def say_warnings(state: TrainState, row: Mapping[str, float], z: Tensor, log: Log) -> None:
    """What a row of the log, with embeddings z [V, G, P], says is going wrong; nothing if all is well."""
    form = state.loss.logsumexp_form()
    collapsed = None if form is None else form.collapsed(images=z.shape[1], views=z.shape[0])
    for line in state.watch.judge(row, collapsed):
        log.say(line)


def train_step(
    state: TrainState,
    network: nn.Module,
    augment: Augment,
    batch: Batch,
    *,
    seed: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    micro_batch: int | None = None,
) -> tuple[LossTerms, Tensor]:
    """One optimization step on a ``batch`` of G images, B of them here. Nothing in it waits for the device.

    With ``micro_batch`` below B, no more than that many images are in the encoder at once, and the gradient is still
    that of the whole batch (gradient caching, Gao et al. 2021): first embeddings without a graph, then the gradient of
    the loss with respect to them, then each part again on the same views, now with a graph. Adding up the losses of
    small batches instead would add no negatives.

    Args:
        network: ``state.model``, replicated over processes and compiled where that was asked for.
        dtype: of the forward pass. The loss is computed in float32.

    Returns:
        The loss terms of this process's anchors, and the embeddings of all images [V, G, P]; both detached.
    """
    images = batch.images  # [B, C, H, W], or crops [B, V, C, S, S]
    first = distributed.rank() * len(images)

    def embed(part: slice) -> Tensor:
        with torch.no_grad():  # always, so that it is compiled once
            views = augment(images[part], seed=seed, step=state.step, first=first + part.start, total=len(batch.labels))
        mixed = torch.autocast(images.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with mixed:
            h, z = network(views.contiguous(memory_format=memory_format))  # [V part, P], unit rows, float32
        if state.online is not None and len(hidden) < len(parts):
            hidden.append(h.detach().unflatten(0, (-1, part.stop - part.start)))
        return z.unflatten(0, (-1, part.stop - part.start))  # [V, part, P]

    size = micro_batch or len(images)
    parts = [slice(i, min(i + size, len(images))) for i in range(0, len(images), size)]
    hidden: list[Tensor] = []  # h of each part [V, part, D], for the online probe
    state.optimizer.zero_grad(set_to_none=True)
    if len(parts) == 1:
        z = embed(parts[0])  # [V, B, P]
    else:
        with torch.no_grad(), frozen_running_statistics(state.model):
            z = torch.cat([embed(part) for part in parts], 1)
        z.requires_grad_()
    all_z = distributed.gather(z.transpose(0, 1)).transpose(0, 1)  # [V, G, P]
    global_batch = GlobalBatch(tuple(all_z), batch.labels, first) if distributed.world_size() > 1 else None
    labels = distributed.shard(batch.labels)
    terms = state.loss(*z, labels=labels, global_batch=global_batch)
    state.scaler.scale(terms.total).backward()
    if len(parts) > 1:
        for part in parts:  # gradients are averaged over processes once, with the last part
            with nullcontext() if part is parts[-1] else without_synchronization(network):
                embed(part).backward(z.grad[:, part])  # type: ignore[index]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.online is not None:
        state.online.learn(torch.cat(hidden, 1), labels)
    if images.device.type != "cpu":  # the device is still busy with this step
        augment.prepare(images, seed=seed, step=state.step + 1, total=len(batch.labels))
    return LossTerms(*(term.detach() for term in terms)), all_z.detach()


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch normalization normalizes by the batch, but does not move its running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def without_synchronization(network: nn.Module) -> AbstractContextManager[Any]:
    """Gradients of a backward pass stay in this process. ``torch.compile`` hands the method of a replica on."""
    no_sync: Callable[[], AbstractContextManager[Any]] = getattr(network, "no_sync", nullcontext)
    return no_sync()


def precision_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype of the forward pass. ``auto`` is float32 on a CPU, and on a GPU bfloat16, or float16 if the GPU would
    only emulate bfloat16, as V100 and T4 do.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    message = "pretrain.precision=fp16 needs CUDA: type pretrain.precision=bf16 or fp32"
    require(precision != "fp16" or device.type != "cpu", message)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def compiled(network: nn.Module, wish: bool | str) -> nn.Module:
    """``network`` compiled; with the wish ``graphs`` each of its passes is launched at once, as a CUDA graph."""
    torch.compiler.reset()  # what earlier runs of this process compiled counts towards its limit of recompilations
    return torch.compile(network, mode="reduce-overhead" if wish == "graphs" else None)  # type: ignore[return-value]


def compiles(device: torch.device, wish: bool | str) -> bool:
    """Whether augmentation and model are compiled: ``auto`` compiles on a GPU.

    Raises:
        UserError: CUDA graphs on a CPU.
    """
    message = "pretrain.compile=graphs needs CUDA: type pretrain.compile=true or auto"
    require(wish != "graphs" or device.type == "cuda", message)
    return device.type == "cuda" if wish == "auto" else bool(wish)

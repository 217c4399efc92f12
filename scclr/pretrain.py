"""Contrastive pretraining: one visible loop.

Dimensions: B images a step, 2B views, D features, P embedding dimensions.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scclr import metrics
from scclr.augment import Augment, generator
from scclr.config import PretrainConfig, UserError, require
from scclr.datasets import ImageSet
from scclr.losses import LossTerms
from scclr.model import Model
from scclr.optim import lr_factor, set_lr

Loss = Callable[[Tensor, Tensor], LossTerms]


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of ``n`` images in an epoch, int64 [n]: a pure function of its arguments."""
    return torch.randperm(n, generator=generator(seed, epoch, stream=0))


def precision_of(device: torch.device, precision: str) -> torch.dtype:
    """The dtype of the forward pass. ``auto`` is bfloat16 on a GPU that has it, float32 elsewhere.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    require(
        precision != "fp16" or device.type != "cpu",
        "pretrain.precision=fp16 needs CUDA: type pretrain.precision=bf16 or fp32",
    )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def train_step(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    loss: Loss,
    augment: Augment,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    *,
    seed: int,
    step: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> tuple[LossTerms, Tensor]:
    """One optimisation step on uint8 ``images`` [B, C, H, W]; nothing in it waits for the device.

    Returns:
        The loss terms and the embeddings [2B, P], both detached.
    """
    views = augment(images, seed=seed, step=step).contiguous(memory_format=layout)  # [2B, C, H, W]
    mixed: AbstractContextManager[Any] = nullcontext()
    if dtype != torch.float32:
        mixed = torch.autocast(images.device.type, dtype)
    with mixed:
        _, z = forward(views)  # [2B, P], unit rows, float32
    terms = loss(*z.chunk(2))
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(terms.total).backward()
    scaler.step(optimizer)
    scaler.update()
    return LossTerms(*(term.detach() for term in terms)), z.detach()


def pretrain(
    model: Model,
    loss: Loss,
    augment: Augment,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    data: ImageSet,
    config: PretrainConfig,
    *,
    seed: int,
    start: int,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int], None],
    knn: Callable[[], float],
) -> None:
    """Train ``model`` in place from step ``start`` to the last one of ``config.epochs``.

    A step is a function of (weights, optimiser and scaler state, seed, step), so a run resumed from a checkpoint is the
    uninterrupted run. The host waits for the device only on the steps that are logged.

    Args:
        log: takes the number of finished steps and a row of metrics.
        save: writes a checkpoint of the finished steps.
        knn: top-1 accuracy on the validation split.

    Raises:
        UserError: the loss is not finite; names the step.
    """
    device, batch = data.images.device, config.batch_size
    steps_per_epoch = len(data) // batch
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    dtype = precision_of(device, config.precision)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.train().to(memory_format=layout)
    forward = torch.compile(model) if config.compile else model
    order = epoch_order(seed, start // steps_per_epoch, len(data)).to(device)
    window = _Window(device, start)
    saved = time.monotonic()
    for step in range(start, total):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            order = epoch_order(seed, epoch, len(data)).to(device, non_blocking=True)
        lr = set_lr(optimizer, lr_factor(step, total, warmup))
        images = data.images[order[position * batch : (position + 1) * batch]]  # [B, C, H, W]
        terms, z = train_step(
            forward, loss, augment, optimizer, scaler, images, seed=seed, step=step, dtype=dtype, layout=layout
        )
        window.add(step, terms)

        done = step + 1
        knn_due = config.knn_every > 0 and done % (config.knn_every * steps_per_epoch) == 0
        if done % config.log_every == 0 or knn_due or done == total:
            row = {"epoch": done / steps_per_epoch, "lr": lr, **window.close(done, batch), **geometry(loss, z)}
            log(done, row | ({"knn": knn()} if knn_due else {}))
            if done == total or time.monotonic() - saved >= config.checkpoint_seconds:
                save(done)
                saved = time.monotonic()
            window = _Window(device, done)


class _Window:
    """Loss terms summed on the device between two logged steps, and the first step at which they were not finite."""

    def __init__(self, device: torch.device, start: int) -> None:
        self.sums = torch.zeros(3, device=device)
        self.bad = torch.full((), torch.iinfo(torch.int64).max, device=device)
        self.start, self.clock = start, time.perf_counter()

    def add(self, step: int, terms: LossTerms) -> None:
        values = torch.stack(terms)
        self.sums += values
        self.bad = torch.where(values.isfinite().all(), self.bad, self.bad.clamp_max(step))

    def close(self, done: int, batch: int) -> dict[str, float]:
        """Means over the window; raises ``UserError`` if a step was not finite. This is where the host waits."""
        total, attract, repel = (self.sums / (done - self.start)).tolist()
        if self.bad < done:
            advice = "lower optimizer.lr, raise loss.temperature or type pretrain.precision=fp32"
            raise UserError(f"the loss is not finite at step {int(self.bad)}: {advice}")
        speed = (done - self.start) * batch / (time.perf_counter() - self.clock)
        return {"loss": total, "attract": attract, "repel": repel, "images_per_second": speed}


def geometry(loss: Loss, z: Tensor) -> dict[str, float]:
    """Metrics of the embeddings z [2B, P] of a step, and the pull of each loss term on them."""
    z1, z2 = z.chunk(2)
    values = {
        "alignment": metrics.alignment(z1, z2),
        "uniformity": metrics.uniformity(z),
        "effective_rank": metrics.effective_rank(z),
        "gradient/attract": metrics.pull(lambda a, b: loss(a, b).attract, z1, z2),
        "gradient/repel": metrics.pull(lambda a, b: loss(a, b).repel, z1, z2),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

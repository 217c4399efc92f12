"""Contrastive pretraining: one visible loop.

Dimensions: G images a step, B of them in this process (B = G in a single one), V views, P embedding dimensions.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from scclr import metrics
from scclr.augment import Augment
from scclr.config import PretrainConfig, UserError, require
from scclr.datasets import ImageSet
from scclr.distributed import World
from scclr.loader import Batch, batches, suited
from scclr.losses import Keys, Loss, LossTerms
from scclr.model import Model
from scclr.optim import lr_factor, set_lr
from scclr.preemption import Pace
from scclr.theory import admission_threshold


class NotFiniteError(UserError):
    """The loss was not finite at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the loss is not finite at step {step}: lower optimizer.lr, raise loss.temperature or type "
            "pretrain.precision=fp32; crash.pt holds the weights and the batch"
        )
        self.step = step


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


def anneal(schedule: str, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` as ``progress`` goes from 0 to 1: ``linear``, or half a ``cosine``."""
    share = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * share


def train_step(
    forward: nn.Module,
    loss: Loss,
    augment: Augment,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    *,
    seed: int,
    step: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    world: World,
    micro_batch: int | None = None,
) -> tuple[LossTerms, Tensor]:
    """One optimisation step on a ``batch`` of G images, B here; nothing in it waits for the device.

    With ``micro_batch`` below B, no more than that many images pass the encoder at once and the gradient is still the
    whole batch's (gradient caching, Gao et al. 2021): embeddings without a graph, the loss's gradient on them, and the
    encoder again part by part on the same views. Adding up losses of small batches would add no negatives.

    Returns:
        The terms of this process's anchors and the embeddings of all [V, G, P], detached.
    """
    images = batch.images  # [B, C, H, W], or [B, V, C, S, S]
    first = world.rank * len(images)

    def embed(part: slice) -> Tensor:
        views = augment(images[part], seed=seed, step=step, first=first + part.start, total=len(batch.labels))
        mixed: AbstractContextManager[Any] = nullcontext()
        if dtype != torch.float32:
            mixed = torch.autocast(images.device.type, dtype)
        with mixed:
            _, z = forward(views.contiguous(memory_format=layout))  # [V part, P], unit rows, float32
        return z.unflatten(0, (-1, part.stop - part.start))  # [V, part, P]

    size = micro_batch or len(images)
    parts = [slice(i, min(i + size, len(images))) for i in range(0, len(images), size)]
    optimizer.zero_grad(set_to_none=True)
    if len(parts) == 1:
        z = embed(parts[0])  # [V, B, P]
    else:
        with torch.no_grad():
            z = torch.cat([embed(part) for part in parts], 1)
        z.requires_grad_()
    everyone = world.gather(z.transpose(0, 1)).transpose(0, 1)  # [V, G, P]
    keys = None if world.size == 1 else Keys(tuple(everyone), batch.labels, first)
    terms = loss(*z, labels=world.share(batch.labels), keys=keys)
    scaler.scale(terms.total).backward()
    if len(parts) > 1:
        for part in parts:
            with nullcontext() if part is parts[-1] else unsynchronised(forward):
                embed(part).backward(z.grad[:, part])  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    loss.update(*everyone.detach(), labels=batch.labels)
    return LossTerms(*(term.detach() for term in terms)), everyone.detach()


def unsynchronised(forward: nn.Module) -> AbstractContextManager[Any]:
    """Gradients stay in the process, to be averaged over processes with the last part's."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


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
    world: World,
    alpha: Callable[[float], float] | None,
    pace: Pace,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, dict[str, Any]], None],
    knn: Callable[[], float],
    carried: dict[str, Any] | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to the last one of ``config.epochs``.

    A step is a function of (weights, optimiser and scaler state, seed, step), so a run resumed from a checkpoint is the
    uninterrupted run, and N processes are one. The host waits for the device only on the steps that are logged.

    Args:
        alpha: the balance at a share of the training from 0 to 1; None leaves the loss's own.
        pace: when to save, and whether to leave then.
        log: takes the number of finished steps and a row of metrics.
        save: writes a checkpoint of the finished steps, with what is summed up for the next row. These two are called
            in the leading process only.
        knn: top-1 accuracy on the validation split.
        carried: what a checkpoint at ``start`` holds for the next row.

    Raises:
        NotFiniteError: the loss is not finite; names the step.
        SystemExit: a signal asked to stop; a checkpoint was written.
    """
    device, batch_size = data.labels.device, config.batch_size
    steps_per_epoch = len(data) // batch_size
    total, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    dtype = precision_of(device, config.precision)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    forward = world.replicate(model.train().to(memory_format=layout))
    forward = torch.compile(forward) if config.compile else forward  # type: ignore[assignment]
    steps, augment = range(start, total), suited(augment, data.images)
    feed = batches(data, augment, seed=seed, batch_size=batch_size, steps=steps, rank=world.rank, size=world.size)
    window = _Window(device, start, world, carried)
    for step, batch in zip(steps, feed, strict=True):
        lr = set_lr(optimizer, lr_factor(step, total, warmup))
        if alpha is not None:
            loss.alpha = alpha(step / max(1, total - 1))
        terms, z = train_step(
            forward, loss, augment, optimizer, scaler, batch,
            seed=seed, step=step, dtype=dtype, layout=layout, world=world, micro_batch=config.micro_batch,
        )  # fmt: skip
        window.add(terms)

        done = step + 1
        knn_due = config.knn_every > 0 and done % (config.knn_every * steps_per_epoch) == 0
        if done % config.log_every == 0 or knn_due or done == total:
            values = window.close(done, batch_size)
            knn_now = {"knn": knn()} if knn_due else {}
            if world.leads:
                row = {"epoch": done / steps_per_epoch, "lr": lr, **values, **geometry(loss, z, batch.labels)}
                log(done, row | knn_now)
            window = _Window(device, done, world)
        if due := world.most(pace.due(done)):
            state = window.state()
            if world.leads:
                save(done, state)
            pace.saved(due)


class _Window:
    """Loss terms of the steps since the last logged one. They stay on the device, unread, until a row or a checkpoint.

    Args:
        carried: ``state`` of a window that a checkpoint cut in two.
    """

    def __init__(self, device: torch.device, begin: int, world: World, carried: dict[str, Any] | None = None) -> None:
        self.steps = [torch.zeros(0, 3, device=device)]  # parts of [steps, 3]
        self.begin = self.timed = begin
        if carried is not None:
            self.begin = carried["begin"]
            self.steps.append(carried["terms"].to(device))
        self.world, self.clock = world, time.perf_counter()

    def add(self, terms: LossTerms) -> None:
        self.steps.append(torch.stack(terms).unsqueeze(0))

    def state(self) -> dict[str, Any]:
        """The terms, means over processes, float64 [steps, 3]: any number of processes can carry them on.

        This is where the host waits.

        Raises:
            NotFiniteError: a step was not finite, in any process.
        """
        terms = (self.world.sum(torch.cat(self.steps).double()) / self.world.size).cpu()
        bad = terms.isfinite().all(1).logical_not().nonzero()
        if len(bad) > 0:
            raise NotFiniteError(self.begin + int(bad[0]))
        return {"terms": terms, "begin": self.begin}

    def close(self, done: int, batch: int) -> dict[str, float]:
        """Means over the window.

        Raises:
            NotFiniteError: see ``state``.
        """
        total, attract, repel = self.state()["terms"].mean(0).tolist()
        speed = (done - self.timed) * batch / (time.perf_counter() - self.clock)
        return {"loss": total, "attract": attract, "repel": repel, "images_per_second": speed}


def geometry(loss: Loss, z: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of the embeddings z [V, G, P] of a step, the pull of each loss term on them, and the current balance.

    Of a loss with a softmax also what alpha lets in (``Admission``); labels are only measured.
    """
    unit = F.normalize(z, dim=2)
    attract, repel = metrics.pulls(lambda views: loss(*views, labels=labels)[1:], z)
    values = {
        "alignment": metrics.alignment(*unit),
        "uniformity": metrics.uniformity(unit.flatten(0, 1)),
        "effective_rank": metrics.effective_rank(unit.flatten(0, 1)),
        "gradient/attract": attract.norm(),
        "gradient/repel": repel.norm(),
        "gradient/cosine": F.cosine_similarity(attract.flatten(), repel.flatten(), dim=0),
    }
    if (softmax := loss.softmax()) is not None:
        known = labels if bool((labels >= 0).all()) else None
        admitted = admission_threshold(unit, softmax.temperature, loss.alpha, labels=known, decoupled=softmax.decoupled)
        values |= {f"admission/{name}": value for name, value in admitted._asdict().items()}
    found = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) | {"alpha": float(loss.alpha)}
    return {name: value for name, value in found.items() if math.isfinite(value)}

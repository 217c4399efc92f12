"""Optimisers, their parameter groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

REFERENCE_BATCH = 256  # images; the batch size at which a base learning rate is quoted (SimCLR, sec. 2.2)


def effective_lr(lr: float, lr_scaling: str, batch_size: int) -> float:
    """The peak learning rate: ``lr`` (none), times B / 256 (linear), or times sqrt(B) (sqrt: SimCLR, app. B.1).

    Raises:
        ValueError: another rule, or ``lr`` not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr}: give a positive number")
    factors = {"none": 1.0, "linear": batch_size / REFERENCE_BATCH, "sqrt": math.sqrt(batch_size)}
    if lr_scaling not in factors:
        raise ValueError(f"lr_scaling={lr_scaling}: choose one of {', '.join(factors)}")
    return lr * factors[lr_scaling]


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at ``step`` (from 0): a linear rise over the warm-up, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def anneal(schedule: str, start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` as ``progress`` goes from 0 to 1: in a line (``linear``), or as half a ``cosine``."""
    share = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * share


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Set every group to ``factor`` times its peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    return float(optimizer.param_groups[0]["lr"])


def parameter_groups(model: nn.Module, weight_decay: float, peak_lr: float) -> list[dict[str, Any]]:
    """Weights, and apart from them what does not decay: biases and norm parameters, which are everything below two
    dimensions, and what ``model.encoder.no_weight_decay()`` names, such as a transformer's class token and positions.

    Raises:
        ValueError: a negative weight decay.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay}: give 0 or more")
    named: set[str] = getattr(getattr(model, "encoder", None), "no_weight_decay", set)()
    kept = {f"encoder.{name}" for name in named}
    weights = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in kept]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or name in kept]
    return [
        {"name": "weights", "params": weights, "weight_decay": weight_decay, "peak_lr": peak_lr, "lr": peak_lr},
        {"name": "biases and norms", "params": others, "weight_decay": 0.0, "peak_lr": peak_lr, "lr": peak_lr},
    ]


def describe(optimizer: Optimizer) -> str:
    """The resolved parameter groups, a line each."""
    lines = []
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        adapted = f", LARS {'on' if group['adapt'] else 'off'}" if "adapt" in group else ""
        lines.append(
            f"{type(optimizer).__name__} {group['name']}: {len(group['params'])} tensors, {count:,} parameters, "
            f"weight decay {group['weight_decay']:g}{adapted}, peak lr {group['peak_lr']:.4g}"
        )
    return "\n".join(lines)


def _fusible(model: nn.Module) -> bool:
    """Whether torch has a fused kernel for the model's device: one pass over memory, and no host sync in fp16."""
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


def adamw(
    *,
    model: nn.Module,
    batch_size: int,
    lr: float,
    lr_scaling: str,
    weight_decay: float,
    betas: list[float],
    eps: float,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019); biases and norms do not decay.

    Raises:
        ValueError: see ``effective_lr`` and ``parameter_groups``; betas that are not two numbers in [0, 1).
    """
    if len(betas) != 2:
        raise ValueError(f"betas={betas}: give two numbers in [0, 1)")
    groups = parameter_groups(model, weight_decay, effective_lr(lr, lr_scaling, batch_size))
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=_fusible(model))


def sgd(
    *,
    model: nn.Module,
    batch_size: int,
    lr: float,
    lr_scaling: str,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> Optimizer:
    """SGD with momentum; biases and norms do not decay.

    Raises:
        ValueError: see ``effective_lr`` and ``parameter_groups``; a negative momentum.
    """
    groups = parameter_groups(model, weight_decay, effective_lr(lr, lr_scaling, batch_size))
    return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, fused=_fusible(model))


def lars(
    *,
    model: nn.Module,
    batch_size: int,
    lr: float,
    lr_scaling: str,
    weight_decay: float,
    momentum: float,
    trust: float,
    momentum_form: str = "lr_outside",
    clip: bool = False,
) -> Optimizer:
    """LARS over all weights; biases and norms take plain SGD steps without decay (SimCLR, sec. 2.2).

    Raises:
        ValueError: see ``effective_lr``, ``parameter_groups`` and ``LARS``.
    """
    groups = parameter_groups(model, weight_decay, effective_lr(lr, lr_scaling, batch_size))
    for group in groups:
        group["adapt"] = group["name"] == "weights"
    return LARS(groups, momentum=momentum, trust=trust, momentum_form=momentum_form, clip=clip)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017), as in SimCLR's code (lars_optimizer.py).

    For each tensor w with gradient g: ``d = g + weight_decay w``; ``d *= trust |w| / |d|`` where the group adapts and
    both norms are positive. You et al. (alg. 1), timm, lightly and solo-learn divide by |g| + weight_decay |w| instead.
    No step waits for the device. All norms are computed together; a kernel for each tensor is left, which multiplies it
    by its ratio.

    Args:
        momentum_form: ``lr_inside``: v = momentum v + lr d; w -= v (You et al., SimCLR). ``lr_outside``: v = momentum v
            + d; w -= lr v (PyTorch's SGD, timm, lightly, solo-learn). They are equal at a constant learning rate.
        clip: the ratio trust |w| / |d| is divided by lr and at most 1, so that lr |d| bounds the length of each update
            (LARC, in apex and solo-learn).

    Raises:
        ValueError: momentum outside [0, 1), trust not positive, or an unknown form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        momentum: float,
        trust: float,
        momentum_form: str = "lr_outside",
        clip: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: give a number in [0, 1)")
        if not trust > 0:
            raise ValueError(f"trust={trust}: give a positive number")
        if momentum_form not in ("lr_inside", "lr_outside"):
            raise ValueError(f"momentum_form={momentum_form}: choose one of lr_inside, lr_outside")
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})
        self.lr_inside, self.clip = momentum_form == "lr_inside", clip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
            if group["weight_decay"]:
                updates = list(torch._foreach_add(updates, params, alpha=group["weight_decay"]))
            if group["adapt"]:
                weight_norms, update_norms = (torch.stack(torch._foreach_norm(x)) for x in (params, updates))
                ratios = self._ratio(weight_norms, update_norms, group)
                ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
                updates = list(torch._foreach_mul(updates, list(ratios.unbind())))
            for p in params:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates, alpha=group["lr"] if self.lr_inside else 1)
            torch._foreach_add_(params, velocities, alpha=-1 if self.lr_inside else -group["lr"])

    def _ratio(self, weight_norm: Tensor, update_norm: Tensor, group: dict[str, Any]) -> Tensor:
        ratio: Tensor = group["trust"] * weight_norm / update_norm
        return (ratio / group["lr"]).clamp(max=1) if self.clip else ratio

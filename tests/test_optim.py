"""Parameter groups, learning rates and LARS against a reference transcription."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from scclr.config.build import build
from scclr.config.compose import conf_dir
from scclr.pretrain.optim import LARS, adamw, describe, effective_lr, lars, lr_factor, set_lr, sgd

ADAMW = {"lr": 0.01, "lr_scaling": "none", "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}
SGD = {"lr": 0.1, "lr_scaling": "none", "weight_decay": 0.1, "momentum": 0.9, "nesterov": False}
LARS_ = {"lr": 0.3, "lr_scaling": "linear", "weight_decay": 0.1, "momentum": 0.9, "trust": 0.001}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_scaling_rules() -> None:
    assert effective_lr(0.1, "none", 1024) == 0.1
    assert effective_lr(0.1, "linear", 1024) == 0.4
    assert math.isclose(effective_lr(0.075, "sqrt", 1024), 2.4)
    with pytest.raises(ValueError, match="none, linear, sqrt"):
        effective_lr(0.1, "cubic", 256)
    with pytest.raises(ValueError, match="lr=0"):
        effective_lr(0, "none", 256)


def test_schedule_is_a_pure_function_of_the_step() -> None:
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert lr_factor(0, 1, 0) == 1


@pytest.mark.parametrize(("make", "arguments"), [(adamw, ADAMW), (sgd, SGD), (lars, LARS_)])
def test_biases_and_norms_do_not_decay(make, arguments: dict) -> None:  # type: ignore[no-untyped-def]
    net = network()
    optimizer = make(model=net, batch_size=512, **arguments)
    weights, others = optimizer.param_groups
    assert [p.shape for p in weights["params"]] == [(4, 1, 3, 3), (3, 16)]
    assert len(others["params"]) == 3
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.clone() for p in others["params"]]
    set_lr(optimizer, 0.5)
    assert weights["lr"] == 0.5 * weights["peak_lr"]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, others["params"], strict=True))
    text = describe(optimizer)
    assert "weights: 2 tensors, 84 parameters, weight decay 0.1" in text
    assert ("LARS off" in text) == (make is lars)


def reference_lars(weights, gradients, rates, decay, momentum, trust, adapt, form, clip) -> list[Tensor]:
    """The algorithms written out tensor by tensor: SimCLR's with lr_inside, PyTorch's momentum with lr_outside."""
    weights = list(weights)
    velocity = [torch.zeros_like(w) for w in weights]
    for lr, step in zip(rates, gradients, strict=True):
        for i, gradient in enumerate(step):
            g, ratio = gradient + decay * weights[i], 1.0
            if adapt:
                w_norm, g_norm = weights[i].norm().item(), g.norm().item()
                if w_norm > 0 and g_norm > 0:
                    ratio = trust * w_norm / g_norm
                    ratio = min(ratio / lr, 1) if clip else ratio
            if form == "lr_inside":
                velocity[i] = momentum * velocity[i] + lr * ratio * g
                weights[i] = weights[i] - velocity[i]
            else:
                velocity[i] = momentum * velocity[i] + ratio * g
                weights[i] = weights[i] - lr * velocity[i]
    return weights


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("form", ["lr_inside", "lr_outside"])
@pytest.mark.parametrize("clip", [False, True])
def test_lars_against_its_transcription(adapt: bool, decay: float, form: str, clip: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 2, 3, 3), (5, 5)]
    weights = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    weights[2].zero_()  # no norm: the ratio is 1
    rates = [0.2 * lr_factor(step, 12, 3) for step in range(12)]
    gradients = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes] for _ in rates]
    params = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": params, "weight_decay": decay, "adapt": adapt}
    optimizer = LARS([group], momentum=0.9, trust=0.2, momentum_form=form, clip=clip)
    for lr, step in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = reference_lars(weights, gradients, rates, decay, 0.9, 0.2, adapt, form, clip)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)


def test_lars_computes_the_ratios_of_all_tensors_together() -> None:
    from torch.profiler import profile

    counts = []
    for tensors in (2, 30):
        params = [nn.Parameter(torch.ones(3, 2)) for _ in range(tensors)]
        optimizer = LARS([{"params": params, "weight_decay": 0.1, "lr": 0.1}], momentum=0.9, trust=0.1)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with profile() as found:
            optimizer.step()
        counts.append(sum(event.name in ("aten::where", "aten::div", "aten::gt") for event in found.events()))
    assert counts[0] == counts[1] > 0


def test_lars_of_the_configuration_is_simclrs() -> None:
    """The two forms of momentum part under a schedule, so the one that the file cites matters."""
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optimizer" / "lars.yaml"))
    net = network().double()
    optimizer = build("optimizer", node, model=net, batch_size=256)
    weights = [p for p in net.parameters() if p.ndim > 1]
    start, draw = [p.detach().clone() for p in weights], torch.Generator().manual_seed(0)
    factors = [lr_factor(step, 60, 6) for step in range(60)]
    gradients = [[torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in weights] for _ in factors]
    for factor, step in zip(factors, gradients, strict=True):
        set_lr(optimizer, factor)
        for p, g in zip(weights, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    rates, rest = [0.3 * factor for factor in factors], (1e-6, 0.9, 0.001, True)
    for form, agrees in (("lr_inside", True), ("lr_outside", False)):
        expected = reference_lars(start, gradients, rates, *rest, form, False)
        error = max(
            float((p.detach() - e).norm() / (s - e).norm()) for p, e, s in zip(weights, expected, start, strict=True)
        )
        assert error < 1e-10 if agrees else error > 0.05


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="weight_decay=-1"):
        sgd(model=network(), batch_size=4, **{**SGD, "weight_decay": -1})
    with pytest.raises(ValueError, match="betas"):
        adamw(model=network(), batch_size=4, **{**ADAMW, "betas": [0.9]})
    with pytest.raises(ValueError, match="trust=0"):
        lars(model=network(), batch_size=4, **{**LARS_, "trust": 0})
    with pytest.raises(ValueError, match="momentum=1"):
        lars(model=network(), batch_size=4, **{**LARS_, "momentum": 1})
    with pytest.raises(ValueError, match="momentum_form=nesterov: choose one of lr_inside, lr_outside"):
        lars(model=network(), batch_size=4, **LARS_, momentum_form="nesterov")

"""Parameter groups, learning rates and LARS against a reference transcription."""

import math

import pytest
import torch
from torch import Tensor, nn

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


def reference_lars(weights, gradients, lr, decay, momentum, trust, adapt) -> list[Tensor]:
    """The algorithm written out tensor by tensor, in float64."""
    weights = [w.double() for w in weights]
    velocity = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for i, gradient in enumerate(step):
            g = gradient.double() + decay * weights[i]
            if adapt:
                w_norm, g_norm = weights[i].norm().item(), g.norm().item()
                if w_norm > 0 and g_norm > 0:
                    g = g * (trust * w_norm / g_norm)
            velocity[i] = momentum * velocity[i] + g
            weights[i] = weights[i] - lr * velocity[i]
    return weights


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_against_its_transcription(adapt: bool, decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (2, 2, 3, 3), (5, 5)]
    weights = [torch.randn(s, generator=draw) for s in shapes]
    weights[2].zero_()  # no norm: the ratio is 1
    gradients = [[torch.randn(s, generator=draw) for s in shapes] for _ in range(5)]
    params = [nn.Parameter(w.clone()) for w in weights]
    group = {"params": params, "weight_decay": decay, "adapt": adapt, "lr": 0.2}
    optimizer = LARS([group], momentum=0.9, trust=0.01)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = reference_lars(weights, gradients, 0.2, decay, 0.9, 0.01, adapt)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="weight_decay=-1"):
        sgd(model=network(), batch_size=4, **{**SGD, "weight_decay": -1})
    with pytest.raises(ValueError, match="betas"):
        adamw(model=network(), batch_size=4, **{**ADAMW, "betas": [0.9]})
    with pytest.raises(ValueError, match="trust=0"):
        lars(model=network(), batch_size=4, **{**LARS_, "trust": 0})
    with pytest.raises(ValueError, match="momentum=1"):
        lars(model=network(), batch_size=4, **{**LARS_, "momentum": 1})

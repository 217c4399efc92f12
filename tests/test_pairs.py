"""The kernel against dense float64, for every tile, mask and temperature; its memory; its derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from allocations import Largest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scclr.losses.pairs import dense_logsumexp, row_logsumexp

few = settings(max_examples=25, deadline=None, derandomize=True)
temperatures = st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0])


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def by_loop(z: Tensor, temperature: float, keep, keys: Tensor | None = None) -> Tensor:
    """log sum_k exp(<z_i, key_k> / temperature) over ``keep(i, k)``, one logit at a time."""
    others = z if keys is None else keys
    return torch.stack(
        [
            torch.stack([row @ other / temperature for k, other in enumerate(others) if keep(i, k)]).logsumexp(0)
            for i, row in enumerate(z)
        ]
    )


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """A weighted sum over the rows, with weights that differ, and its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    rows = function(*leaves)
    weights = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype)
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp(min=1e-300)


# ``unit=False`` takes the running maximum, which temperatures of float64 would need only below 0.003.


@few
@given(n=st.integers(2, 12), tile=st.sampled_from([1, 2, 3, 5, 12, 30]), tau=temperatures, seed=st.integers(0, 99))
def test_square(n, tile, tau, seed):
    z = unit(n, 3, seed=seed)
    expected = value_and_gradients(lambda z: by_loop(z, tau, lambda i, k: i != k), z)
    assert_equal(value_and_gradients(lambda z: row_logsumexp(z, tau, tile=tile), z), expected, 1e-12)
    assert_equal(value_and_gradients(lambda z: row_logsumexp(z, tau, tile=tile, unit=False), z), expected, 1e-12)


@few
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 12),
    tile=st.sampled_from([1, 2, 5, 30]),
    tau=temperatures,
    seed=st.integers(0, 9),
)
def test_rectangle(n, m, tile, tau, seed):
    z, keys = unit(n, 3, seed=seed), unit(m, 3, seed=seed + 1)
    expected = value_and_gradients(lambda z, keys: by_loop(z, tau, lambda i, k: True, keys), z, keys)
    for unit_rows in (True, False):
        found = value_and_gradients(
            lambda z, keys, unit_rows=unit_rows: row_logsumexp(z, tau, keys=keys, tile=tile, unit=unit_rows), z, keys
        )
        assert_equal(found, expected, 1e-12)


@few
@given(tile=st.sampled_from([1, 2, 5, 30]), tau=temperatures, seed=st.integers(0, 99), unit_rows=st.booleans())
def test_equal_ids_are_left_out(tile, tau, seed, unit_rows):
    ids = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(seed))
    ids[:2] = torch.tensor([0, 1])  # so that no row is left without a key
    z, keys, key_ids = unit(10, 3, seed=seed), unit(7, 3, seed=seed + 1), torch.tensor([5, 0, 1, 2, 1, 0, 5])
    expected = value_and_gradients(lambda z: by_loop(z, tau, lambda i, k: ids[i] != ids[k]), z)
    assert_equal(
        value_and_gradients(lambda z: row_logsumexp(z, tau, ids=ids, tile=tile, unit=unit_rows), z), expected, 1e-12
    )

    expected = value_and_gradients(lambda z, y: by_loop(z, tau, lambda i, k: ids[i] != key_ids[k], y), z, keys)
    found = value_and_gradients(
        lambda z, y: row_logsumexp(z, tau, ids=ids, keys=y, key_ids=key_ids, tile=tile, unit=unit_rows), z, keys
    )
    assert_equal(found, expected, 1e-12)


@few
@given(
    period=st.integers(1, 12),
    n=st.integers(2, 12),
    tile=st.sampled_from([1, 2, 3, 5, 30]),
    tau=st.sampled_from([0.01, 0.5]),
    unit_rows=st.booleans(),
)
def test_views_of_one_image_are_left_out(period, n, tile, tau, unit_rows):
    z = unit(n, 3)
    loop = [[z[i] @ z[k] / tau for k in range(n) if (k - i) % period] for i in range(n)]
    expected = torch.stack([torch.stack(row).logsumexp(0) if row else torch.tensor(-math.inf) for row in loop])
    found, gradient = value_and_gradients(lambda z: row_logsumexp(z, tau, period=period, tile=tile, unit=unit_rows), z)
    torch.testing.assert_close(found, expected.double(), rtol=1e-12, atol=1e-12)
    assert gradient.isfinite().all()
    if expected.isfinite().all():
        dense = value_and_gradients(lambda z: dense_logsumexp(z / tau**0.5, None, period, None), z)
        assert_equal([found, gradient], dense, 1e-12)


def dense64(z: Tensor, tau: float) -> list[Tensor]:
    return value_and_gradients(lambda z: dense_logsumexp(z / tau**0.5, None, len(z), None), z.double())


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["aligned", "random", "duplicated", "antipodal"])
def test_float32_accuracy(tau, kind):
    half = unit(151, 32)
    other = {
        "aligned": F.normalize(half + 0.1 * unit(151, 32, seed=1), dim=1),
        "random": unit(151, 32, seed=1),
        "duplicated": half[:1].expand(151, -1),
        "antipodal": -half,
    }[kind]
    z = torch.cat([half, other]).float()
    value, gradient = value_and_gradients(lambda z: row_logsumexp(z, tau, tile=100), z)
    exact, exact_gradient = dense64(z, tau)
    assert abs(value.double().mean() - exact.mean()) <= 1e-6 * abs(exact.mean())
    error = (gradient - exact_gradient).norm() / exact_gradient.norm()
    assert error <= (1e-5 if tau >= 0.1 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_half_precision_is_computed_in_float32(dtype, tau):
    z = unit(40, 16).to(dtype)
    value, gradient = value_and_gradients(lambda z: row_logsumexp(z, tau, tile=16), z)
    exact, exact_gradient = value_and_gradients(lambda z: row_logsumexp(z, tau, tile=16), z.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, exact)
    assert torch.equal(gradient, exact_gradient.to(dtype))


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_autocast_changes_nothing(tau):
    z = unit(20, 8, dtype=torch.float32)
    expected = value_and_gradients(lambda z: row_logsumexp(z, tau), z)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda z: row_logsumexp(z, tau), z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_changes_no_second_derivative():
    def first(z: Tensor) -> Tensor:
        return torch.autograd.grad(row_logsumexp(z, 0.5).sum(), z, create_graph=True)[0].square().sum()

    z = unit(20, 8, dtype=torch.float32).requires_grad_()
    expected = torch.autograd.grad(first(z), z)[0]
    with torch.autocast("cpu", torch.bfloat16):
        squares = first(z)
    assert torch.equal(torch.autograd.grad(squares, z)[0], expected)


def test_long_rows_need_the_running_maximum():
    z = 30 * unit(20, 4, dtype=torch.float32)  # logits up to 900
    found = value_and_gradients(lambda z: row_logsumexp(z, 1.0, tile=7, unit=False), z)
    assert all(torch.isfinite(x).all() for x in found)
    assert_equal(found, dense64(z, 1.0), 1e-5)


@pytest.mark.parametrize("tile", [3, 100])
def test_derivatives(tile):
    z, keys = unit(7, 3).requires_grad_(), unit(5, 3, seed=1).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    functions = [
        (lambda z: row_logsumexp(z, 0.3, tile=tile), (z,)),
        (lambda z: row_logsumexp(z, 0.3, ids=ids, tile=tile), (z,)),
        (lambda z, tau: row_logsumexp(z, tau, tile=tile), (z, tau)),
        (lambda z, keys, tau: row_logsumexp(z, tau, keys=keys, tile=tile), (z, keys, tau)),
        (lambda keys: row_logsumexp(z.detach(), 0.3, keys=keys, tile=tile), (keys,)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_temperature_gradient():
    z = unit(9, 4)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    row_logsumexp(z, tau, tile=4).mean().backward()
    s = z @ z.T
    p = (s / 0.2).fill_diagonal_(-math.inf).softmax(1)
    torch.testing.assert_close(tau.grad, -(p * s).sum(1).mean() / 0.2**2, rtol=1e-12, atol=0)


def test_limits_of_temperature():
    z = unit(12, 4)
    s = (z @ z.T).fill_diagonal_(-math.inf)
    torch.testing.assert_close(1e-4 * row_logsumexp(z, 1e-4), s.amax(1), rtol=0, atol=1e-3)
    mean = 1e4 * (row_logsumexp(z, 1e4) - math.log(11))
    torch.testing.assert_close(mean, (z @ z.T - torch.eye(12)).sum(1) / 11, rtol=0, atol=1e-3)


@pytest.mark.parametrize("unit_rows", [True, False])
def test_a_row_without_keys_is_minus_infinity(unit_rows):
    ids = torch.zeros(4, dtype=torch.int64)
    rows, gradient = value_and_gradients(lambda z: row_logsumexp(z, 0.5, ids=ids, unit=unit_rows), unit(4, 3))
    assert torch.equal(rows, torch.full((4,), -math.inf, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("tau", [0.01, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_linear(tau, masked):
    n, width, tile = 200, 4, 16
    z = unit(n, width, dtype=torch.float32).requires_grad_()
    ids = torch.arange(n) // 2 if masked else None
    with Largest() as largest:
        row_logsumexp(z, tau, ids=ids, tile=tile).sum().backward()
        row_logsumexp(z, tau, ids=ids, keys=z, key_ids=ids, tile=tile).sum().backward()
    assert largest.elements == n * width  # never n * n
    with Largest() as largest:
        dense_logsumexp(z, None, n, None).sum().backward()
    assert largest.elements == n * n


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_shapes_without_data(tau):
    z = torch.empty(30, 8, device="meta", requires_grad=True)
    rows = row_logsumexp(z, tau, ids=torch.empty(30, dtype=torch.int64, device="meta"), tile=8)
    rows.sum().backward()
    assert rows.device.type == "meta"
    assert z.grad.shape == (30, 8)


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_no_host_sync_and_no_other_device(tau):
    """A fake GPU has no values, so anything that would wait for one raises, and mixing devices does too."""
    with FakeTensorMode():
        z = torch.empty(30, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids = torch.arange(30, device="cuda")
        assert row_logsumexp(z, tau, ids=ids, tile=8).device.type == "cuda"
        assert row_logsumexp(z, tau, ids=ids, keys=z, key_ids=ids, tile=8).device.type == "cuda"

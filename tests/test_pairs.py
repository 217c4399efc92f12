"""The kernel against a loop over pairs in float64, for every tile, mask and temperature, and its single derivative.

``unit=False`` takes the running maximum, which ``unit=True`` takes only at temperatures below 0.003 in float64.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_helpers import few, seeds
from torch import Tensor

from scclr.losses.pairs import float32_products, row_logsumexp

temperatures = st.sampled_from([0.001, 0.01, 0.05, 0.5, 1.0, 1000.0])
tiles = st.sampled_from([1, 2, 3, 5, 12, 30])
bools = st.booleans()


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def by_loop(z: Tensor, temperature: float, keep: Callable[[int, int], bool], keys: Tensor | None = None) -> Tensor:
    """log sum_k exp(<z_i, key_k> / temperature) over ``keep(i, k)``, one logit at a time."""
    keys = z if keys is None else keys
    logits = [[row @ key / temperature for k, key in enumerate(keys) if keep(i, k)] for i, row in enumerate(z)]
    return torch.stack([torch.stack(row).logsumexp(0) if row else z.new_tensor(-math.inf) for row in logits])


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The rows that ``function`` returns, and the gradients of their sum with weights that differ."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    rows = function(*leaves)
    weights = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype)
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    (rows, *gradients), (expected_rows, *expected_gradients) = found, expected
    torch.testing.assert_close(rows.double(), expected_rows, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-300)


@few
@given(n=st.integers(2, 12), tile=tiles, tau=temperatures, seed=seeds, unit_rows=bools)
def test_rows_against_themselves(n, tile, tau, seed, unit_rows):
    z = unit(n, 3, seed=seed)
    expected = value_and_gradients(lambda z: by_loop(z, tau, lambda i, k: i != k), z)
    assert_equal(value_and_gradients(lambda z: row_logsumexp(z, tau, tile=tile, unit=unit_rows), z), expected)


@few
@given(n=st.integers(1, 9), m=st.integers(1, 12), tile=tiles, tau=temperatures, seed=seeds, unit_rows=bools)
def test_rows_against_keys(n, m, tile, tau, seed, unit_rows):
    z, keys = unit(n, 3, seed=seed), unit(m, 3, seed=seed + 1)
    expected = value_and_gradients(lambda z, keys: by_loop(z, tau, lambda i, k: True, keys), z, keys)
    options = {"tile": tile, "unit": unit_rows}
    assert_equal(value_and_gradients(lambda z, y: row_logsumexp(z, tau, keys=y, **options), z, keys), expected)
    of_keys = value_and_gradients(lambda y: row_logsumexp(z, tau, keys=y, **options), keys)
    assert_equal(of_keys, [expected[0], expected[2]])


@few
@given(tile=tiles, tau=temperatures, seed=seeds, unit_rows=bools)
def test_pairs_with_equal_ids_are_left_out(tile, tau, seed, unit_rows):
    ids = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(seed))
    z, keys, key_ids = unit(10, 3, seed=seed), unit(7, 3, seed=seed + 1), torch.tensor([5, 0, 1, 2, 1, 0, 5])
    options = {"ids": ids, "tile": tile, "unit": unit_rows}
    expected = value_and_gradients(lambda z: by_loop(z, tau, lambda i, k: ids[i] != ids[k]), z)
    assert_equal(value_and_gradients(lambda z: row_logsumexp(z, tau, **options), z), expected)
    expected = value_and_gradients(lambda z, y: by_loop(z, tau, lambda i, k: ids[i] != key_ids[k], y), z, keys)
    found = value_and_gradients(lambda z, y: row_logsumexp(z, tau, keys=y, key_ids=key_ids, **options), z, keys)
    assert_equal(found, expected)


@few
@given(period=st.integers(1, 12), n=st.integers(2, 12), tile=tiles, tau=temperatures, unit_rows=bools)
def test_views_of_one_image_are_left_out(period, n, tile, tau, unit_rows):
    """With a period of 1 nothing is left: the rows are -inf, and the gradient is zero."""
    z = unit(n, 3)
    expected = value_and_gradients(lambda z: by_loop(z, tau, lambda i, k: (k - i) % period != 0) + 0 * z.sum(), z)
    found = value_and_gradients(lambda z: row_logsumexp(z, tau, period=period, tile=tile, unit=unit_rows), z)
    assert_equal(found, expected)


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_autocast_changes_neither_value_nor_gradient(tau):
    z = unit(20, 8, dtype=torch.float32)
    expected = value_and_gradients(lambda z: row_logsumexp(z, tau), z)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda z: row_logsumexp(z, tau), z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_products_are_in_full_float32_whatever_the_process_chose(temperature, monkeypatch):
    """Where the card or the processor has no faster kind, only the setting in force can be seen."""
    z, seen = unit(20, 8, dtype=torch.float32), []
    older = torch.get_float32_matmul_precision()
    expected = value_and_gradients(lambda z: row_logsumexp(z, temperature), z)
    multiply = torch.mm

    def noted(*args, **options):
        backend = getattr(torch.backends.mkldnn, "matmul", None)
        by_backend = hasattr(backend, "fp32_precision")
        seen.append(backend.fp32_precision if by_backend else torch.get_float32_matmul_precision())
        return multiply(*args, **options)

    monkeypatch.setattr(torch, "mm", noted)
    try:
        torch.set_float32_matmul_precision("medium")
        found = value_and_gradients(lambda z: row_logsumexp(z, temperature, tile=7), z)
        assert torch.get_float32_matmul_precision() == "medium", "the choice of the process is left as it was"
    finally:
        torch.set_float32_matmul_precision(older)
    assert set(seen) <= {"ieee", "highest"}
    assert len(seen) == 6 + 6, "both passes"
    assert_equal(found, [x.double() for x in expected], 1e-5)


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
def test_on_a_gpu_products_are_not_in_tf32(chosen):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("before PyTorch 2.9 a single setting serves all devices")
    older = matmul.fp32_precision
    try:
        matmul.fp32_precision = chosen
        with float32_products(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = older


def test_the_kernel_can_be_compiled():
    z = unit(20, 8, dtype=torch.float32)
    compiled = torch.compile(lambda z: row_logsumexp(z, 0.5), backend="eager", fullgraph=True)
    expected = value_and_gradients(lambda z: row_logsumexp(z, 0.5), z)
    assert all(map(torch.equal, value_and_gradients(compiled, z), expected))


def test_long_rows_do_not_overflow():
    z = 30 * unit(20, 4, dtype=torch.float32)  # logits up to 900
    expected = value_and_gradients(lambda z: by_loop(z, 1.0, lambda i, k: i != k), z.double())
    assert_equal(value_and_gradients(lambda z: row_logsumexp(z, 1.0, tile=7, unit=False), z), expected, 1e-5)


def test_a_second_derivative_is_refused():
    z = unit(5, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(row_logsumexp(z, 0.5).sum(), z, create_graph=True)

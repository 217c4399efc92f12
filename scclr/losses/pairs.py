"""The log-sum-exp over all pairs of rows, exact in value and gradient, in O(N) memory.

Dimensions: N rows z [N, P] are compared with themselves or with M keys [M, P]; a tile has up to T x T pairs.

    f_i     = log sum_k exp(l_ik)                     l_ik = <z_i, z_k> / tau, over the pairs that are not left out
    df/dz_i = sum_k (w_i p_ik + w_k p_ki) z_k / tau   p_ik = exp(l_ik - f_i), w the gradient with respect to f

Products are computed in full float32, whatever the process has chosen for its other products (``float32_products``).
At most a few tiles exist at a time. The backward pass computes them again, unless a single tile holds all pairs. Rows
compared with themselves form a symmetric matrix, so both passes compute its upper triangle only, and a tile off the
diagonal serves the rows of both of its sides.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor] | None  # of rows [N] and keys [M]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in full precision: not in TF32 on a GPU, nor in bfloat16 on a CPU.

    An error of TF32 in a similarity is about 5e-4, and a temperature of 0.05 makes it 1 % of exp(s / temperature).
    ``torch.compile`` takes the setting that it finds when it compiles, so there this does nothing.
    """
    if torch.compiler.is_compiling():
        yield
        return
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    backend = getattr(backend, "matmul", None)
    by_backend = hasattr(backend, "fp32_precision")  # from torch 2.9 on
    older = backend.fp32_precision if by_backend else torch.get_float32_matmul_precision()
    if older in ("none", "ieee", "highest"):
        yield
        return

    def choose(precision: str) -> None:
        if by_backend:
            backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    choose("ieee" if by_backend else "highest")
    try:
        yield
    finally:
        choose(older)


def tile_of(device: torch.device) -> int:
    """The default side of a tile: what fits a core's cache on a CPU, and what is worth a kernel launch elsewhere.

    On one core of an EPYC with 1 MiB of second-level cache, sides from 384 to 768 are equally fast and 1024 takes 10 %
    longer.
    """
    return 512 if device.type == "cpu" else 4096


def widen(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; other types as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def row_logsumexp(
    z: Tensor,
    temperature: float,
    *,
    period: int | None = None,
    ids: Tensor | None = None,
    keys: Tensor | None = None,
    key_ids: Tensor | None = None,
    unit: bool = True,
    tile: int | None = None,
) -> Tensor:
    """log sum_k exp(<z_i, key_k> / temperature) for every row i, [N]; -inf, with no gradient, where no k is left.

    Without ``keys`` the rows are their own keys, and k runs over k != i, or over k != i modulo ``period``. The result
    can be differentiated once.

    ``unit`` rows bound every logit by 1 / temperature. Where that is at most half of the range of the dtype
    (temperature >= 0.023 in float32), exponentials are summed as they are: no number of rows overflows or underflows.
    Elsewhere they are summed relative to a running maximum, at about twice the cost.

    Args:
        z: rows [N, P]. bfloat16 and float16 are computed in float32.
        period: number of images, if the rows hold one view after the other and views of one image are left out.
        ids, key_ids: int64 [N] and [M]; pairs with equal ids are left out. Without ``keys``, ``ids`` serves both.
        unit: the rows of ``z`` and ``keys`` have length at most one.
        tile: side of a tile; None takes that of ``tile_of``.
    """
    z, keys = widen(z), None if keys is None else widen(keys)
    largest_logit = 1 / temperature if unit else math.inf
    plain = largest_logit <= math.log(torch.finfo(z.dtype).max) / 2
    rows = z / (temperature if keys is not None else temperature**0.5)  # scaling [N, P] is cheaper than scaling logits
    pair_ids = None if ids is None else (ids, ids if key_ids is None else key_ids)
    return _LogSumExp.apply(rows, keys, period or len(z), pair_ids, plain, tile or tile_of(z.device))


class _Tiles:
    """Tiles of logits, or of their exponentials where ``plain``. All share one buffer. Where the rows are their own
    keys, the tiles cover the upper triangle.

    Args:
        single: the tile that holds all pairs, if it is known already; it is not written to.
    """

    def __init__(
        self, rows: Tensor, keys: Tensor | None, period: int, ids: Ids, plain: bool, tile: int, single: Tensor | None
    ) -> None:
        self.rows, self.keys, self.period, self.ids, self.tile = rows, rows if keys is None else keys, period, ids, tile
        self.symmetric, self.plain, self.single = keys is None, plain, single
        self.buffer = rows.new_empty(min(tile, len(rows)) * min(tile, len(self.keys)))

    def __iter__(self) -> Iterator[tuple[slice, slice, bool, Tensor]]:
        """(rows, keys, whether the mirror image is needed too, tile [T, T])."""
        n, m, t = len(self.rows), len(self.keys), self.tile
        if self.single is not None:
            yield slice(0, n), slice(0, m), False, self.single
            return
        for a in range(0, n, t):
            i = slice(a, min(a + t, n))
            for b in range(a if self.symmetric else 0, m, t):
                j = slice(b, min(b + t, m))
                height, width = i.stop - a, j.stop - b
                logits = self.buffer[: height * width].view(height, width)
                torch.mm(self.rows[i], self.keys[j].T, out=logits)  # products with out=, and in place, ignore autocast
                if self.symmetric:  # k - i is a multiple of the period on these diagonals, often on none
                    lowest = (a - b + height - 1) % self.period + 1 - height
                    for diagonal in range(lowest, width, self.period):
                        logits.diagonal(diagonal).fill_(-math.inf)
                if self.ids is not None:
                    logits.masked_fill_(self.ids[0][i].unsqueeze(1) == self.ids[1][j], -math.inf)
                yield i, j, self.symmetric and a != b, logits.exp_() if self.plain else logits


class _LogSumExp(torch.autograd.Function):
    """Where ``plain``, sums of exponentials as they are; elsewhere log-sum-exps, added in the log domain."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor | None, period: int, ids: Ids, plain: bool, tile: int) -> Tensor:
        sums = rows.new_full((len(rows),), 0 if plain else -math.inf)
        values = None
        with float32_products(rows.device):
            for i, j, mirror, values in _Tiles(rows, keys, period, ids, plain, tile, None):
                if plain:
                    sums[i] += values.sum(1)
                    if mirror:
                        sums[j] += values.sum(0)
                else:
                    sums[i] = sums[i].logaddexp(values.logsumexp(1))
                    if mirror:
                        sums[j] = sums[j].logaddexp(values.logsumexp(0))
        single = values is not None and values.shape == (len(rows), len(rows if keys is None else keys))
        ctx.save_for_backward(rows, keys, sums, values if single else None)
        ctx.period, ctx.ids, ctx.plain, ctx.tile = period, ids, plain, tile
        return sums.log() if plain else sums

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would silently return zero where w needs no gradient
            raise NotImplementedError("row_logsumexp has no second derivative: leave out create_graph=True")
        rows, keys, sums, single = ctx.saved_tensors
        tiles = _Tiles(rows, keys, ctx.period, ctx.ids, ctx.plain, ctx.tile, single)
        to_rows = torch.zeros_like(rows)
        to_keys = to_rows if keys is None else torch.zeros_like(keys)
        by_sum, scratch = torch.where(sums == 0, 0, w / sums), torch.empty_like(tiles.buffer)
        sums = sums.masked_fill(sums == -math.inf, 0)  # a row without keys has no gradient
        with float32_products(rows.device):
            for i, j, mirror, tile in tiles:
                if ctx.plain:  # w_i p_ik + w_k p_ki = exp(l_ik) (w_i / S_i + w_k / S_k), with the sums S_i = exp(f_i)
                    product = scratch[: tile.numel()].view_as(tile)
                    weights = by_sum[i].unsqueeze(1)
                    weights = torch.add(weights, by_sum[j], out=product) if tiles.symmetric else weights
                    tile = torch.mul(tile, weights, out=product)
                else:
                    weights = (tile - sums[i].unsqueeze(1)).exp_().mul_(w[i].unsqueeze(1))
                    tile = weights.add_((tile - sums[j]).exp_().mul_(w[j])) if tiles.symmetric else weights
                to_rows[i].addmm_(tile, tiles.keys[j])
                if mirror or not tiles.symmetric:
                    to_keys[j].addmm_(tile.T, rows[i])
        return to_rows, None if keys is None else to_keys, None, None, None, None

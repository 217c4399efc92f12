"""The log-sum-exp over all pairs of rows, exact in value and gradient, in O(N) memory.

Dimensions: N rows z [N, P] against themselves, or against M keys [M, P]; T rows in a tile.

    f_i     = log sum_k exp(l_ik)                     l_ik = <z_i, z_k> / tau, over the pairs that are not left out
    df/dz_i = sum_k (w_i p_ik + w_k p_ki) z_k / tau   p_ik = exp(l_ik - f_i), w the gradient with respect to f

No more than a few T x T tiles exist at a time: the backward pass computes them again, unless one was all. Rows against
themselves form a symmetric matrix, so only its upper triangle is computed, in both passes, and a tile off the diagonal
serves the rows of both of its sides.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor] | None  # of rows [N] and keys [M]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def tile_of(device: torch.device) -> int:
    """Side of a tile by default: on a CPU, what stays in a core's cache; elsewhere, what is worth a kernel launch.

    On one core of an EPYC with 1 MiB of second-level cache, sides from 384 to 768 are equal and 1024 takes 10 % longer.
    """
    return 512 if device.type == "cpu" else 4096


def widen(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def row_logsumexp(
    z: Tensor,
    temperature: float | Tensor,
    *,
    period: int | None = None,
    ids: Tensor | None = None,
    keys: Tensor | None = None,
    key_ids: Tensor | None = None,
    unit: bool = True,
    tile: int | None = None,
) -> Tensor:
    """log sum_k exp(<z_i, key_k> / temperature) for every row i, [N]; -inf, with no gradient, where no k is left.

    Without ``keys`` the rows are their own keys, and k runs over k != i, or over k != i modulo ``period``.

    Exponentials are summed as they are where ``unit`` rows bound every logit by 1 / temperature and half of the dtype's
    range holds it (temperature >= 0.023 in float32: neither overflow nor underflow for any number of rows), else
    relative to a running maximum, at about twice the cost. A ``temperature`` that is a tensor is differentiated, and
    takes the second way, since its value is not known to the host. A second derivative takes O(N M) memory.

    Args:
        z: rows [N, P]. bfloat16 and float16 are computed in float32.
        period: how many images the rows hold, one view after the other, where views of one image are left out.
        ids, key_ids: int64 [N] and [M]; pairs with equal ids are left out. Without ``keys``, ``ids`` serves both.
        unit: the rows of ``z`` and ``keys`` have length at most one.
    """
    z, keys = widen(z), None if keys is None else widen(keys)
    reach = math.inf if isinstance(temperature, Tensor) or not unit else 1 / temperature
    plain = reach <= math.log(torch.finfo(z.dtype).max) / 2
    # Scaled rows make the logits, and the temperature's gradient, at the cost of one [N, P] pass.
    rows = z / (temperature if keys is not None else temperature**0.5)
    pair_ids = None if ids is None else (ids, ids if key_ids is None else key_ids)
    return _LogSumExp.apply(rows, keys, period or len(z), pair_ids, plain, tile or tile_of(z.device))


def dense_logsumexp(rows: Tensor, keys: Tensor | None, period: int, ids: Ids) -> Tensor:
    """The same of scaled rows in O(N M) memory, by automatic differentiation."""
    with full_precision(rows.device):
        logits = rows @ (rows if keys is None else keys).T  # [N, M]
    if keys is None:
        image = torch.arange(len(rows), device=rows.device) % period
        logits = logits.masked_fill(image.unsqueeze(1) == image, -math.inf)
    if ids is not None:
        logits = logits.masked_fill(ids[0].unsqueeze(1) == ids[1], -math.inf)
    return logits.logsumexp(1)


class _Tiles:
    """Tiles of logits, or of their exponentials where ``plain``, each in the same buffer; of the upper triangle where
    the rows are their own keys.

    Args:
        only: the one tile that there is, if it is known already; it is not written to.
    """

    def __init__(
        self, rows: Tensor, keys: Tensor | None, period: int, ids: Ids, plain: bool, tile: int, only: Tensor | None
    ) -> None:
        self.rows, self.keys, self.period, self.ids, self.tile = rows, rows if keys is None else keys, period, ids, tile
        self.symmetric, self.plain, self.only = keys is None, plain, only
        self.buffer = rows.new_empty(min(tile, len(rows)) * min(tile, len(self.keys)))

    def __iter__(self) -> Iterator[tuple[slice, slice, bool, Tensor]]:
        """(rows, keys, whether the mirror image is needed too, tile [T, T])."""
        n, m, t = len(self.rows), len(self.keys), self.tile
        if self.only is not None:
            yield slice(0, n), slice(0, m), False, self.only
            return
        for a in range(0, n, t):
            i = slice(a, min(a + t, n))
            for b in range(a if self.symmetric else 0, m, t):
                j = slice(b, min(b + t, m))
                height, width = i.stop - a, j.stop - b
                logits = self.buffer[: height * width].view(height, width)
                torch.mm(self.rows[i], self.keys[j].T, out=logits)  # out= and in-place products ignore autocast
                if self.symmetric:  # k - i is a multiple of the period on these diagonals, often on none
                    lowest = (a - b + height - 1) % self.period + 1 - height
                    for diagonal in range(lowest, width, self.period):
                        logits.diagonal(diagonal).fill_(-math.inf)
                if self.ids is not None:
                    logits.masked_fill_(self.ids[0][i].unsqueeze(1) == self.ids[1][j], -math.inf)
                yield i, j, self.symmetric and a != b, logits.exp_() if self.plain else logits


class _LogSumExp(torch.autograd.Function):
    """``plain``: sums of exponentials as they are; else log-sum-exps, added in the log domain."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor | None, period: int, ids: Ids, plain: bool, tile: int) -> Tensor:
        sums = rows.new_full((len(rows),), 0 if plain else -math.inf)
        values = None
        for i, j, mirror, values in _Tiles(rows, keys, period, ids, plain, tile, None):
            if plain:
                sums[i] += values.sum(1)
                if mirror:
                    sums[j] += values.sum(0)
            else:
                sums[i] = sums[i].logaddexp(values.logsumexp(1))
                if mirror:
                    sums[j] = sums[j].logaddexp(values.logsumexp(0))
        whole = values is not None and values.shape == (len(rows), len(rows if keys is None else keys))
        ctx.save_for_backward(rows, keys, sums, values if whole else None)
        ctx.period, ctx.ids, ctx.plain, ctx.tile = period, ids, plain, tile
        return sums.log() if plain else sums

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, *_ = ctx.saved_tensors
        to_rows: Tensor | None
        to_keys: Tensor | None
        if torch.is_grad_enabled():  # the caller asked for a gradient that can be differentiated again
            needed = [x for x, need in zip((rows, keys), ctx.needs_input_grad, strict=False) if need]
            with full_precision(rows.device):
                dense = dense_logsumexp(rows, keys, ctx.period, ctx.ids)
                found = list(torch.autograd.grad(dense, needed, w, create_graph=True))
            to_rows, to_keys = (found.pop(0) if need else None for need in ctx.needs_input_grad[:2])
        else:
            to_rows, to_keys = torch.zeros_like(rows), None if keys is None else torch.zeros_like(keys)
            _accumulate(to_rows, to_rows if to_keys is None else to_keys, ctx, w)
        return to_rows, to_keys, None, None, None, None


def _accumulate(to_rows: Tensor, to_keys: Tensor, ctx: Any, w: Tensor) -> None:
    """Add the gradients with respect to rows and keys, which are one tensor where the rows are their own keys."""
    rows, keys, sums, only = ctx.saved_tensors
    tiles = _Tiles(rows, keys, ctx.period, ctx.ids, ctx.plain, ctx.tile, only)
    share, scratch = torch.where(sums == 0, 0, w / sums), torch.empty_like(tiles.buffer)
    sums = sums.masked_fill(sums == -math.inf, 0)  # a row without keys has no gradient
    for i, j, mirror, tile in tiles:
        if ctx.plain:  # w_i p_ik + w_k p_ki = exp(l_ik) (w_i / S_i + w_k / S_k)
            both = scratch[: tile.numel()].view_as(tile)
            weights = share[i].unsqueeze(1)
            weights = torch.add(weights, share[j], out=both) if tiles.symmetric else weights
            tile = torch.mul(tile, weights, out=both)
        else:
            weights = (tile - sums[i].unsqueeze(1)).exp_().mul_(w[i].unsqueeze(1))
            tile = weights.add_((tile - sums[j]).exp_().mul_(w[j])) if tiles.symmetric else weights
        to_rows[i].addmm_(tile, tiles.keys[j])
        if mirror or not tiles.symmetric:
            to_keys[j].addmm_(tile.T, rows[i])

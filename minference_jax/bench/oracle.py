"""Checks of a kernel's output against the oracle: whole at a small length, a few query tiles at a long one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from minference_jax.bench.inputs import Activations
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import SparseLayout, layout_mask
from minference_jax.kernels.tiles import TileConfig

TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest error allowed: in float32 absolute; in half precision, where outputs and weights are rounded to 2**-9 or
2**-12, the relative Frobenius norm over any query tile of any head."""
_FAR_ENOUGH = 1 << 29  # bound of positions, so that their sums do not overflow


class WrongResult(RuntimeError):
    """A kernel's output differs from the oracle's by more than rounding."""


def check(error: float, dtype: str, what: str) -> float:
    """Gives the error back where it is allowed.

    Raises:
      WrongResult: it is above the dtype's tolerance.
    """
    if not error <= TOLERANCES[dtype]:
        raise WrongResult(
            f"{what}: the error against the oracle is {error:.2e}, above {TOLERANCES[dtype]}; no time is measured"
        )
    return error


def _error(out: Array, expected: Array, dtype: str) -> Array:
    """The error of out [..., R, H] in the terms of ``TOLERANCES``: float32 [], inf where anything is NaN."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    if dtype == "float32":
        errors = jnp.abs(out - expected)
    else:
        wrong, norm = (jnp.square(x).sum(axis=(-2, -1)) for x in (out - expected, expected))
        errors = jnp.sqrt(wrong / jnp.where(norm > 0, norm, 1.0))
    return jnp.where(jnp.isnan(errors), jnp.inf, errors).max()  # on CPUs XLA's maximum passes over NaN


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "dtype"))
def whole_error(
    inputs: Activations, out: Array, layout: SparseLayout, *, scale: float, tiles: TileConfig, dtype: str
) -> Array:
    """The error of an output over all queries; memory is quadratic.

    Args:
      inputs: q [1, T, N, H], k and v [1, T, K, H].
      out: [1, T, N, H], of the kernel.
      layout: of the N heads of one sequence, built for ``tiles``.
      scale: multiplies the scores.
      dtype: whose tolerance the error is for.
    """
    length = out.shape[1]
    where = (jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), length, length, tiles)
    q, k, v = (x.astype(jnp.float32) for x in inputs)
    expected, _ = reference.attention(q, k, v, layout_mask(layout, *where), scale=scale)

    def by_tile(x):  # [1, T, N, H] -> [N, tiles, block_q, H]
        x = jnp.pad(x[0], ((0, -length % tiles.block_q), (0, 0), (0, 0)))
        return x.reshape(-1, tiles.block_q, *x.shape[1:]).transpose(2, 0, 1, 3)

    return _error(by_tile(out), by_tile(expected), dtype)


def sampled_error(
    inputs: Activations, out: Array, layout: SparseLayout, *, scale: float, tiles: TileConfig, dtype: str
) -> float:
    """The largest error of an output over four query tiles, the first and the last among them, against all keys.

    Memory is linear in T. Arguments as for ``whole_error``.
    """
    last = layout.block_counts.shape[-1] - 1
    samples = sorted({last * i // 3 for i in range(4)})
    errors = [_tile_error(inputs, out, layout, i, scale=scale, tiles=tiles, dtype=dtype) for i in samples]
    return float(jnp.stack(errors).max())


@functools.partial(jax.jit, static_argnames=("scale", "tiles", "dtype"))
def _tile_error(inputs, out, layout, tile, *, scale: float, tiles: TileConfig, dtype: str) -> Array:
    q, k, v = inputs
    length, num_heads = q.shape[1:3]
    row = tile * tiles.block_q + jnp.arange(tiles.block_q, dtype=jnp.int32)
    rows, found = (jnp.take(x[0], row, axis=0, mode="clip").swapaxes(0, 1) for x in (q, out))  # [N, block_q, H]

    def head(args):
        index, rows, found, lists = args
        of_group = index // (num_heads // k.shape[2])
        keys, values = (lax.dynamic_index_in_dim(x[0], of_group, axis=1).astype(jnp.float32)[None] for x in (k, v))
        mask = tile_mask(lists, tile, length, tiles)
        expected, _ = reference.attention(
            rows.astype(jnp.float32)[None, :, None], keys, values, mask[None, None], scale=scale
        )
        return _error(jnp.where((row < length)[:, None], found, 0), expected[0, :, 0], dtype)

    lists = SparseLayout(*(x[0] for x in layout))
    return lax.map(head, (jnp.arange(num_heads, dtype=jnp.int32), rows, found, lists)).max()


def tile_mask(lists: SparseLayout, tile: Array | int, length: int, tiles: TileConfig) -> Array:
    """What ``layout_mask`` says of the rows of one query tile of one head, in memory linear in ``length``.

    Args:
      lists: a layout without its axes of sequences and heads; positions begin at 0.
      tile: the query tile, int or int32 [].
      length: tokens.
      tiles: the sizes of the layout.

    Returns:
      bool [block_q, length].
    """
    start = tile * tiles.block_q
    position = start + jnp.arange(tiles.block_q, dtype=jnp.int32)[:, None]
    key = jnp.arange(length, dtype=jnp.int32)

    def covered(begins, count):  # whether keys lie in one of the blocks, bool [length]
        used = jnp.arange(begins.size) < count
        low, high = (jnp.clip(jnp.where(used, x, 0), 0, length) for x in (begins, begins + tiles.block_kv))
        high = jnp.where(used, high, low)
        steps = jnp.zeros(length + 1, jnp.int32).at[low].add(1).at[high].add(-1)
        return jnp.cumsum(steps)[:length] > 0

    slash = covered(jnp.maximum(lists.offsets, -_FAR_ENOUGH) + start, lists.offset_counts)
    ids = jnp.minimum(lists.block_ids[tile], _FAR_ENOUGH // tiles.block_kv)
    listed = covered(ids * tiles.block_kv, lists.block_counts[tile])
    used = jnp.arange(lists.columns.size) < lists.column_counts
    column = jnp.zeros(length, bool).at[jnp.where(used, lists.columns, length)].set(True, mode="drop")
    seen = (slash & (position - key < lists.windows)) | listed | column
    return seen & (key <= position) & (position < length)

"""Sparse attention of mixed heads in pure JAX: every platform, work and memory in proportion to what is kept.

A step multiplies query rows with keys copied side by side. XLA's CPU dot uses one core for 64 rows and all of them for
256, so four query tiles go together wherever they can share keys: on long runs of slash blocks (the four windows
overlap almost wholly; every row masks what lies outside its own) and on columns. What is left, scattered slash blocks
and listed blocks, goes tile by tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels import softmax
from minference_jax.kernels.layouts import FAR, SparseLayout
from minference_jax.kernels.tiles import TileConfig

SHARED_TILES = 4
"""Query tiles that share their keys in one step."""
SHARED_WIDTH = 1024
"""Keys per step of ``SHARED_TILES`` tiles."""
COLUMN_WIDTH = 256
"""Columns per step of ``SHARED_TILES`` tiles: few, because a head's last step is half empty on average."""
TILE_WIDTH = 256
"""Keys per step of one tile."""
LONG_RUN = 4
"""Blocks side by side from which sharing pays: n + 3 shared blocks at twice the speed against 4 n / 4."""


_take = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)


class _Blocks(NamedTuple):
    """Blocks relative to a tile or a group of tiles; each with the interval its run keeps for the first tile."""

    starts: Array  # int32 [C], descending but for the ends of runs, then -FAR
    low: Array  # int32 [C], first kept key
    high: Array  # int32 [C], end of the kept keys


def _select(keep: Array, blocks: _Blocks) -> _Blocks:
    order = jnp.argsort(~keep, stable=True)
    return _Blocks(*(jnp.where(keep[order], x[order], -FAR) for x in blocks))


def split_runs(offsets: Array, count: Array, tiles: TileConfig, num_shared: int) -> tuple[_Blocks, _Blocks]:
    """Splits a head's slash blocks into those that neighbouring tiles share and those that each reads alone.

    Args:
      offsets: int32 [C], descending. count: int32 [], used entries.
      tiles: tile sizes.
      num_shared: tiles that go together.

    Returns:
      Blocks relative to the first tile of a group, and blocks relative to each tile.
    """
    block_q, block_kv = tiles.block_q, tiles.block_kv
    index = jnp.arange(offsets.size, dtype=jnp.int32)
    used = index < count
    breaks = jnp.concatenate([jnp.ones(1, bool), offsets[:-1] - offsets[1:] != block_kv])
    run = jnp.cumsum(breaks, dtype=jnp.int32) - 1
    length = jnp.zeros_like(offsets).at[run].add(used.astype(jnp.int32))[run]
    high = offsets[lax.cummax(jnp.where(breaks, index, 0))] + block_kv
    low = high - length * block_kv
    is_shared = used & (length >= LONG_RUN) & (num_shared > 1)
    # The later tiles of a group reach further right: (num_shared - 1) * block_q keys behind the end of the run.
    behind = jnp.arange((num_shared - 1) * block_q // block_kv, dtype=jnp.int32)[::-1]
    starts = jnp.concatenate([high[:, None] + behind * block_kv, offsets[:, None]], axis=1)
    keep = jnp.concatenate(
        [jnp.broadcast_to((is_shared & breaks)[:, None], starts[:, 1:].shape), is_shared[:, None]], 1
    )
    low_, high_ = (jnp.broadcast_to(x[:, None], starts.shape).reshape(-1) for x in (low, high))
    shared = _select(keep.reshape(-1), _Blocks(starts.reshape(-1), low_, high_))
    return shared, _select(used & ~is_shared, _Blocks(offsets, offsets, offsets + block_kv))


def attention(
    q: Array,
    k: Array,
    v: Array,
    layout: SparseLayout,
    *,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    skip_threshold: float | None = None,
) -> tuple[Array, Array]:
    """Attention over exactly the pairs of ``layout_mask(layout)``.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. Any float dtype; the arithmetic is float32.
      layout: of B sequences and N heads, built for ``tiles``.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys; rows at positions >= kv_len are padding.
      tiles: tile sizes.
      skip_threshold: as in ``minference_jax.attention``; a tile is one step: up to ``SHARED_TILES`` of queries with
        ``SHARED_WIDTH`` keys or ``COLUMN_WIDTH`` columns, or one of queries with ``TILE_WIDTH`` keys.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; padding gives zeros and -inf.
    """
    num_heads, group_size = q.shape[2], q.shape[2] // k.shape[2]
    run_head = functools.partial(_head_kernel, scale=scale, tiles=tiles, skip_threshold=skip_threshold)

    def sequence(args):
        q, k, v, layout, offset, length = args
        k, v = (x.swapaxes(0, 1).astype(jnp.float32) for x in (k, softmax.valid_rows(v, length)))

        def head(args):
            index, q, layout = args
            return run_head(q, k[index // group_size], v[index // group_size], layout, offset, length)

        out, lse = lax.map(head, (jnp.arange(num_heads), q.swapaxes(0, 1), layout))
        out = jnp.where(layout.windows[:, None, None] >= 0, out, jnp.nan).astype(out.dtype)
        lse = jnp.where(layout.windows[:, None] >= 0, lse, jnp.nan)
        return out.swapaxes(0, 1), lse.swapaxes(0, 1)

    return lax.map(sequence, (q, k, v, layout, q_offset, kv_len))


def _pad_list(x: Array, multiple: int, fill: int) -> Array:
    pad = max(-x.shape[-1] % multiple, 0 if x.shape[-1] else multiple)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], constant_values=fill)


def _pad_blocks(blocks: _Blocks, multiple: int) -> _Blocks:
    return _Blocks(*(_pad_list(x, multiple, -FAR) for x in blocks))


def _steps(descending: Array, above: Array, size: int) -> Array:
    """Steps of ``size`` entries that hold all entries above each bound; the list may rise a little where runs end."""
    ascending = -lax.cummax(descending, reverse=True)
    return (jnp.searchsorted(ascending, -above, side="left") + size - 1) // size


def _gather_columns(k: Array, v: Array, layout: SparseLayout, width: int) -> tuple[Array, Array, Array]:
    """The head's columns side by side, copied as far as they are used: keys, values [C, H] and positions [C]."""
    positions = _pad_list(layout.columns, width, FAR)

    def copy(i, out):
        at = jnp.minimum(_take(positions, i * width, width), k.shape[0] - 1)
        return tuple(
            lax.dynamic_update_slice_in_dim(to, x[at], i * width, axis=0) for to, x in zip(out, (k, v), strict=True)
        )

    empty = jnp.zeros((positions.size, k.shape[1]), k.dtype)
    keys, values = lax.fori_loop(0, (layout.column_counts + width - 1) // width, copy, (empty, empty))
    return keys, values, positions


def _head_kernel(
    q, k, v, layout: SparseLayout, offset, length, *, scale: float, tiles: TileConfig, skip_threshold: float | None
):
    """One head of one sequence: q [T, H], k, v float32 [S, H] -> out [T, H], lse [T]."""
    block_q, block_kv = tiles.block_q, tiles.block_kv
    q_len, head_dim = q.shape
    num_shared = min(SHARED_TILES, -(-q_len // block_q))
    group_q = num_shared * block_q
    num_groups = -(-q_len // group_q)
    group_rows, tile_rows = (jnp.arange(n, dtype=jnp.int32) for n in (group_q, block_q))
    update = functools.partial(softmax.update, skip_threshold=skip_threshold)

    def up_to_padding(origin, end):  # rows of padding have no say in what is skipped
        return end if skip_threshold is None else jnp.minimum(end, jnp.minimum(length, offset + q_len) - origin)

    width = min(COLUMN_WIDTH, max(layout.columns.size, 1))
    column_k, column_v, columns = _gather_columns(k, v, layout, width)
    used = jnp.arange(layout.columns.size) < layout.column_counts
    is_column = jnp.zeros(k.shape[:1], bool).at[jnp.where(used, layout.columns, FAR)].set(True, mode="drop")
    # Blocks may start before the first key or end behind the last one.
    k, v, is_column = (jnp.pad(x, [(block_kv, block_kv)] + [(0, 0)] * (x.ndim - 1)) for x in (k, v, is_column))
    shared, alone = split_runs(layout.offsets, layout.offset_counts, tiles, num_shared)
    shared, alone = _pad_blocks(shared, SHARED_WIDTH // block_kv), _pad_blocks(alone, TILE_WIDTH // block_kv)
    ids = _pad_list(jnp.minimum(layout.block_ids, FAR // block_kv), TILE_WIDTH // block_kv, FAR // block_kv)

    def add_blocks(acc, q, rows, origin, blocks, at, size):
        """Adds ``size`` blocks from entry ``at`` on; the row of tile j keeps keys in [low, high) + j * block_q."""
        starts, low, high = (_take(x, at, size) for x in blocks)

        def bounds(block):  # the first and the end of the rows that see each key
            start, low, high = block
            key = (start[:, None] + jnp.arange(block_kv, dtype=jnp.int32)).reshape(-1)
            low, high = (jnp.repeat(x, block_kv, total_repeat_length=key.size) for x in (low, high))
            skip = jnp.concatenate([_take(is_column, at + origin + block_kv, block_kv) for at in start])
            skip |= (key + origin < 0) | (key + origin >= length)
            first = jnp.maximum(key, ((key - high) // block_q + 1) * block_q)
            end = jnp.minimum(key + layout.windows, ((key - low) // block_q + 1) * block_q)
            return first, jnp.where(skip, 0, up_to_padding(origin, end))

        def copy(x):
            return jnp.concatenate([_take(x, at + origin + block_kv, block_kv) for at in starts])

        # A loop of its own, of several steps: fused into the scores, the bounds would be computed once for every score.
        first, end = lax.map(bounds, [x.reshape(min(4, size), -1) for x in (starts, low, high)])
        return update(acc, q, copy(k), copy(v), rows, first.reshape(-1), end.reshape(-1))

    def add_shared(acc, q, origin, steps):
        size = SHARED_WIDTH // block_kv

        def step(i, acc):
            return add_blocks(acc, q, group_rows, origin, shared, i * size, size)

        return lax.fori_loop(0, steps, step, acc)

    def add_columns(acc, q, origin, steps):
        def step(i, acc):
            keys, values, at = (_take(x, i * width, width) for x in (column_k, column_v, columns))
            end = jnp.where(at < length, up_to_padding(origin, group_q), 0)
            return update(acc, q, keys, values, group_rows, at - origin, end)

        return lax.fori_loop(0, steps, step, acc)

    def add_alone(acc, q, origin, steps, ids, id_count):
        size = TILE_WIDTH // block_kv
        starts = ids * block_kv - origin
        listed = _Blocks(starts, starts, starts + block_kv)

        def step(blocks):
            return lambda i, acc: add_blocks(acc, q, tile_rows, origin, blocks, i * size, size)

        acc = lax.fori_loop(0, steps, step(alone), acc)
        return lax.fori_loop(0, (id_count + size - 1) // size, step(listed), acc)

    def group(args):
        origin, q, shared_steps, column_steps, tile_args = args
        q = q.astype(jnp.float32) * scale

        def compute():
            acc = add_shared(softmax.start(group_q, head_dim), q, origin, shared_steps)
            acc = add_columns(acc, q, origin, column_steps)

            def tile(args):
                q, acc, (origin, steps, ids, id_count) = args
                return add_alone(acc, q, origin, steps, ids, id_count)

            def each_tile():
                per_tile = jax.tree.map(lambda x: x.reshape(num_shared, block_q, *x.shape[1:]), (q, acc))
                return jax.tree.map(lambda x: x.reshape(group_q, *x.shape[2:]), lax.map(tile, (*per_tile, tile_args)))

            _, steps, _, id_counts = tile_args
            return softmax.finish(lax.cond((steps + id_counts).any(), each_tile, lambda: acc))

        out, lse = lax.cond(origin < length, compute, lambda: softmax.finish(softmax.start(group_q, head_dim)))
        real = origin + group_rows < length
        return jnp.where(real[:, None], out, 0.0), jnp.where(real, lse, -jnp.inf)

    def grouped(x, fill=0):
        x = jnp.pad(x, [(0, -x.shape[0] % (num_groups * num_shared))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(num_groups, num_shared, *x.shape[1:])

    rows = jnp.pad(q, ((0, num_groups * group_q - q_len), (0, 0))).reshape(num_groups, group_q, head_dim)
    origins = offset + jnp.arange(num_groups, dtype=jnp.int32) * group_q
    tile_origins = origins[:, None] + jnp.arange(num_shared, dtype=jnp.int32) * block_q
    shared_steps = _steps(shared.starts, -origins - block_kv, SHARED_WIDTH // block_kv)
    column_steps = _steps(-columns, -origins - group_q, width)
    alone_steps = _steps(alone.starts, -tile_origins - block_kv, TILE_WIDTH // block_kv)
    tile_args = (tile_origins, alone_steps, grouped(ids, FAR // block_kv), grouped(layout.block_counts))
    out, lse = lax.map(group, (origins, rows, shared_steps, column_steps, tile_args))
    return out.reshape(-1, head_dim)[:q_len].astype(q.dtype), lse.reshape(-1)[:q_len]

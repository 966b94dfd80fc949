"""The integer arrays a sparse attention kernel reads, how they are built, and what they mean.

Shape letters: B batch, T queries, S keys, N query heads, C a static capacity, Tq = ceil(T / block_q) query tiles.
A query tile that starts at absolute position a reads

* slash blocks: keys [a + o, a + o + block_kv) for each offset o of its head. A slash (a query-key distance d) needs
  [a - d, a - d + block_q) whatever the tile, so one list of offsets per head serves every tile;
* listed blocks: keys [block_kv * i, block_kv * (i + 1)) for each id i that its head and tile list;
* columns: single keys, the same for every tile of the head.

Blocks of one head never overlap, and a pair of query and key counts once, however many of these hold it. A head that
lists blocks has neither slash blocks nor columns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels.tiles import TileConfig

FAR = 1 << 30
"""Fills the unused end of every list: a key position no array reaches, so an ignored count shows."""


class SparseLayout(NamedTuple):
    """What every head of one layer computes.

    Attributes:
      offsets: int32 [B, N, C]. Slash blocks as key start minus tile start, descending, then -FAR.
      offset_counts: int32 [B, N]. Used entries of ``offsets``.
      columns: int32 [B, N, C]. Key positions, ascending, then FAR.
      column_counts: int32 [B, N]. Used entries of ``columns``.
      windows: int32 [B, N]. Pairs in slash blocks count only at distances below this (FAR: no bound); it makes the
        window of an A-shape exact to the token. FAR for heads with listed blocks. Negative: the head can't be honoured,
        and its output is NaN.
      block_ids: int32 [B, N, Tq, C]. Listed blocks, ascending, then FAR.
      block_counts: int32 [B, N, Tq]. Used entries of ``block_ids``.
    """

    offsets: Array
    offset_counts: Array
    columns: Array
    column_counts: Array
    windows: Array
    block_ids: Array
    block_counts: Array


def compact(mask: Array, capacity: int, fill: int = FAR) -> Array:
    """Positions of the True entries along the last axis, ascending.

    Args:
      mask: bool [..., M].
      capacity: static length of the lists; entries past it are lost, so it must be at least the largest count.
      fill: stands behind the last entry.

    Returns:
      int32 [..., capacity].
    """
    size = mask.shape[-1]
    flat = mask.reshape(-1, size)
    slots = jnp.where(flat, jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - 1, capacity)
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    out = jnp.full((flat.shape[0], capacity), fill, jnp.int32)
    out = out.at[rows, slots].set(jnp.arange(size, dtype=jnp.int32)[None], mode="drop")
    return out.reshape(*mask.shape[:-1], capacity)


def slash_offsets(slashes: Array, tiles: TileConfig, diagonals: bool = False) -> tuple[Array, Array]:
    """Covers the slashes of each head with non-overlapping blocks.

    Neighbouring slashes form a run; runs are so far apart that their blocks never meet. Inside a run blocks lie side
    by side from its nearest end, and those that no slash needs are left out.

    Args:
      slashes: bool [..., S], entry d True where distance d (query position minus key position, in tokens) is kept.
      tiles: tile sizes.
      diagonals: slashes are block diagonals: distances count in blocks of ``block_kv`` tokens, S and C with them.

    Returns:
      offsets int32 [..., C], descending, padded with -FAR, and counts int32 [...]. C = (S + block_q) // block_kv + 3.
    """
    if diagonals:
        offsets, counts = slash_offsets(slashes, TileConfig(block_q=tiles.block_q // tiles.block_kv, block_kv=1))
        return jnp.where(offsets == -FAR, -FAR, offsets * tiles.block_kv), counts
    block_q, block_kv = tiles.block_q, tiles.block_kv
    # Entry u stands for distance u, and for the block of offset block_q - block_kv - u, whose end is the end of the
    # keys that distance u needs.
    wanted = jnp.pad(slashes, [(0, 0)] * (slashes.ndim - 1) + [(0, block_q + block_kv)])
    u = jnp.arange(wanted.shape[-1], dtype=jnp.int32)
    last = lax.cummax(jnp.where(wanted, u, -FAR), axis=wanted.ndim - 1)  # the last wanted distance up to u
    before = jnp.concatenate([jnp.full_like(last[..., :1], -FAR), last[..., :-1]], axis=-1)
    opens = wanted & (u - before >= block_q + block_kv - 1)
    start = lax.cummax(jnp.where(opens, u, -FAR), axis=wanted.ndim - 1)  # where the run at u began

    def ahead(x: Array) -> Array:  # x at u + block_kv - 1
        tail = jnp.broadcast_to(x[..., -1:], (*x.shape[:-1], block_kv - 1))
        return jnp.concatenate([x, tail], axis=-1)[..., block_kv - 1 :]

    on_lattice = (start >= 0) & ((u - start) % block_kv == 0)
    needed = (ahead(last) > u - block_q) & (ahead(start) == start)
    blocks = on_lattice & needed
    found = compact(blocks, wanted.shape[-1] // block_kv + 2)
    offsets = jnp.where(found == FAR, -FAR, block_q - block_kv - found)
    return offsets, blocks.sum(axis=-1, dtype=jnp.int32)


def tile_starts(q_offset: Array, q_len: int, tiles: TileConfig) -> Array:
    """Absolute position of the first query of every tile: int32 [B, Tq] from q_offset int32 [B]."""
    num_tiles = -(-q_len // tiles.block_q)
    return q_offset[:, None] + jnp.arange(num_tiles, dtype=jnp.int32) * tiles.block_q


def count_above(lists: Array, bounds: Array) -> Array:
    """How many entries of descending lists [B, N, C] lie above bounds [B, N, Tq] (broadcast): int32 [B, N, Tq]."""
    search = functools.partial(jnp.searchsorted, side="left", method="scan_unrolled")
    bounds = jnp.broadcast_to(bounds, (*lists.shape[:2], bounds.shape[-1]))
    return jax.vmap(jax.vmap(search))(-lists, -bounds).astype(jnp.int32)


def side_by_side(k: Array, v: Array, layout: SparseLayout, step: int) -> tuple[Array, Array, Array]:
    """The keys and values of every head's columns, copied side by side.

    Args:
      k, v: [B, S, K, H], N a multiple of K.
      layout: of B sequences and N heads.
      step: their number C is a multiple of it.

    Returns:
      k and v [B, N, C, H], and positions int32 [B, N, C], then FAR.
    """
    batch, num_heads, capacity = layout.columns.shape
    used = jnp.arange(capacity) < layout.column_counts[..., None]
    positions = jnp.where(used, layout.columns, FAR)
    positions = jnp.pad(positions, [(0, 0), (0, 0), (0, -capacity % step)], constant_values=FAR)
    heads = jnp.arange(num_heads)[:, None] // (num_heads // k.shape[2])
    at = (jnp.arange(batch)[:, None, None], jnp.where(positions < FAR, positions, 0), heads)
    return k[at], v[at], positions


def columns_before(positions: Array, starts: Array, block_q: int, kv_len: Array) -> Array:
    """Columns that each tile of ``block_q`` queries reads: int32 [B, N, Tq].

    positions: int32 [B, N, C], ascending. starts: int32 [B, Tq], of the tiles. kv_len: int32 [B].
    """
    end = jnp.where(starts < kv_len[:, None], jnp.minimum(starts + block_q, kv_len[:, None]), 0)
    return count_above(-positions, -end[:, None])


def listed_counts(layout: SparseLayout, starts: Array, kv_len: Array, tiles: TileConfig) -> tuple[Array, Array]:
    """Listed blocks of each tile that every row sees whole, and all that it reads: int32 [B, N, Tq] each.

    starts: int32 [B, Tq], of the tiles. kv_len: int32 [B].
    """
    starts = starts[:, None]
    counts = jnp.minimum(layout.block_counts, layout.block_ids.shape[-1])  # a head that asks for more is not honoured
    total = jnp.where(starts < kv_len[:, None, None], counts, 0)
    seen = layout.block_ids < ((starts + 1) // tiles.block_kv)[..., None]  # by every row, as by the first
    return jnp.minimum(seen.sum(axis=-1, dtype=jnp.int32), total), total


def computed_keys(layout: SparseLayout, q_offset: Array, kv_len: Array, q_len: int, tiles: TileConfig) -> Array:
    """Keys each query tile computes, in tokens, after the blocks and columns that lie wholly outside it are skipped.

    Args:
      layout: of B sequences and N heads.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys.
      q_len: T.
      tiles: the sizes the layout was built for.

    Returns:
      int32 [B, N, Tq]; 0 for tiles of padding.
    """
    starts = tile_starts(q_offset, q_len, tiles)  # [B, Tq]
    blocks = count_above(layout.offsets, -(starts + tiles.block_kv)[:, None])
    blocks = jnp.minimum(blocks, layout.offset_counts[..., None])
    columns = count_above(-layout.columns, -jnp.minimum(starts + tiles.block_q, kv_len[:, None])[:, None])
    keys = (blocks + layout.block_counts) * tiles.block_kv + columns
    return jnp.where((starts < kv_len[:, None])[:, None], keys, 0).astype(jnp.int32)


def density(layout: SparseLayout, q_offset: Array, kv_len: Array, q_len: int, tiles: TileConfig) -> Array:
    """Share of the work of dense causal attention, counted in tiles, that each head computes.

    Args: as for ``computed_keys``.

    Returns:
      float32 [B, N]; 1.0 is dense. Columns beside blocks can take it slightly above 1.
    """
    starts = tile_starts(q_offset, q_len, tiles)
    reach = jnp.minimum(starts + tiles.block_q, kv_len[:, None])
    dense = jnp.where(starts < kv_len[:, None], -(-reach // tiles.block_kv) * tiles.block_kv, 0)
    kept = computed_keys(layout, q_offset, kv_len, q_len, tiles).astype(jnp.float32).sum(axis=-1)
    return kept / jnp.maximum(dense.astype(jnp.float32).sum(axis=-1), 1.0)[:, None]


def costs_dense(share: Array) -> Array:
    """Bool, where a ``density`` is that of dense attention, but for its rounding, or above it."""
    return share >= 1 - 1e-6


def everything(batch: int, num_heads: int, q_len: int, kv_capacity: int, tiles: TileConfig) -> SparseLayout:
    """The layout of dense attention, with room for nothing else.

    Args:
      batch: B. num_heads: N. q_len: T. kv_capacity: S. tiles: tile sizes.

    Returns:
      SparseLayout of B sequences and N heads.
    """
    count = -(-(kv_capacity + tiles.block_q - 1) // tiles.block_kv)  # for a tile that starts at the last key, too
    offsets = tiles.block_q - tiles.block_kv - jnp.arange(count, dtype=jnp.int32) * tiles.block_kv
    heads, num_tiles = (batch, num_heads), -(-q_len // tiles.block_q)
    none = functools.partial(jnp.zeros, dtype=jnp.int32)
    return SparseLayout(
        offsets=jnp.broadcast_to(offsets, (*heads, count)),
        offset_counts=jnp.full(heads, count, jnp.int32),
        columns=none((*heads, 0)),
        column_counts=none(heads),
        windows=jnp.full(heads, FAR, jnp.int32),
        block_ids=none((*heads, num_tiles, 0)),
        block_counts=none((*heads, num_tiles)),
    )


def make_dense(layout: SparseLayout, heads: Array, kv_capacity: int, tiles: TileConfig) -> SparseLayout:
    """Lets the marked heads keep everything.

    Args:
      layout: of B sequences and N heads.
      heads: bool [B, N], True where the head becomes dense.
      kv_capacity: S.
      tiles: the sizes the layout was built for.

    Returns:
      SparseLayout of the same shapes.
    """
    batch, num_heads = heads.shape
    dense = everything(batch, num_heads, kv_capacity, kv_capacity, tiles)
    room = [(0, 0), (0, 0), (0, layout.offsets.shape[-1] - dense.offsets.shape[-1])]
    offsets = jnp.pad(dense.offsets, room, constant_values=-FAR)
    return layout._replace(
        offsets=jnp.where(heads[..., None], offsets, layout.offsets),
        offset_counts=jnp.where(heads, dense.offset_counts, layout.offset_counts),
        columns=jnp.where(heads[..., None], FAR, layout.columns),
        column_counts=jnp.where(heads, 0, layout.column_counts),
        windows=jnp.where(heads, FAR, layout.windows),
        block_counts=jnp.where(heads[..., None], 0, layout.block_counts),
    )


def layout_mask(
    layout: SparseLayout, q_offset: Array, kv_len: Array, q_len: int, kv_capacity: int, tiles: TileConfig
) -> Array:
    """The meaning of a layout: True where query row t attends key j. Quadratic memory: for tests and small inputs.

    Args:
      layout: of B sequences and N heads.
      q_offset: int32 [B]. kv_len: int32 [B]. q_len: T. kv_capacity: S. tiles: the sizes of the layout.

    Returns:
      bool [B, N, T, S].
    """
    keys = jnp.arange(kv_capacity, dtype=jnp.int32)
    rows = jnp.arange(q_len, dtype=jnp.int32)

    def one(offsets, offset_count, columns, column_count, window, ids, id_counts, offset, length):
        position = offset + rows
        start = offset + rows // tiles.block_q * tiles.block_q
        used = jnp.arange(offsets.size) < offset_count
        begin = jnp.where(used, offsets, -2 * FAR)[None] + start[:, None]  # [T, C]
        slash = ((keys >= begin[..., None]) & (keys < begin[..., None] + tiles.block_kv)).any(axis=1)
        slash &= position[:, None] - keys < window
        in_list = jnp.arange(ids.shape[-1]) < id_counts[:, None]
        listed = (jnp.where(in_list, ids, -1)[..., None] == keys // tiles.block_kv).any(axis=1)[rows // tiles.block_q]
        column = ((columns[:, None] == keys) & (jnp.arange(columns.size) < column_count)[:, None]).any(axis=0)
        causal = (keys <= position[:, None]) & (keys < length) & (position < length)[:, None]
        return (slash | listed | column) & causal

    over_heads = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, 0, 0, None, None))
    return jax.vmap(over_heads)(*layout, q_offset, kv_len)


def tile_mask(
    layout: SparseLayout, tile: Array, q_offset: Array, kv_len: Array, kv_capacity: int, tiles: TileConfig
) -> Array:
    """The rows of ``layout_mask`` that belong to one query tile, in memory linear in S.

    Args:
      layout: of B sequences and N heads.
      tile: int32 [], index of the query tile.
      q_offset: int32 [B]. kv_len: int32 [B]. kv_capacity: S. tiles: the sizes of the layout.

    Returns:
      bool [B, N, block_q, S].
    """
    keys, in_block = (jnp.arange(n, dtype=jnp.int32) for n in (kv_capacity, tiles.block_kv))

    def mark(starts: Array, count: Array, width: Array) -> Array:  # bool [S]: keys [start, start + width) of a list
        index = jnp.where((jnp.arange(starts.size) < count)[:, None], starts[:, None] + width, FAR)
        return jnp.zeros(kv_capacity, bool).at[jnp.where(index < 0, FAR, index)].set(True, mode="drop")

    def one(offsets, offset_count, columns, column_count, window, ids, id_counts, offset, length):
        start = offset + tile * tiles.block_q
        position = (start + jnp.arange(tiles.block_q, dtype=jnp.int32))[:, None]
        slash = mark(start + offsets, offset_count, in_block) & (position - keys < window)
        listed = mark(jnp.minimum(ids[tile], FAR // tiles.block_kv) * tiles.block_kv, id_counts[tile], in_block)
        column = mark(columns, column_count, jnp.zeros(1, jnp.int32))
        return (slash | listed | column) & (keys <= position) & (keys < length) & (position < length)

    over_heads = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, 0, 0, None, None))
    return jax.vmap(over_heads)(*layout, q_offset, kv_len)

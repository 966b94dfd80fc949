"""A layout as the steps that two warpgroups take together: what the Mosaic GPU kernel reads.

A program computes a tile of 128 queries, each of its two warpgroups 64 of them. A step brings 128 keys in two halves of
64, which may come from different places. In a whole step both warpgroups use all 128; in a split step warpgroup 0 uses
the first half and warpgroup 1 the second. So tiles of 64 by 64 cost no more than their own work, and where both
warpgroups need a block it is brought once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels.layouts import (
    FAR,
    SparseLayout,
    columns_before,
    compact,
    count_above,
    listed_counts,
    side_by_side,
    tile_starts,
)
from minference_jax.kernels.tiles import TileConfig

HALF = 64
"""Queries of a warpgroup, and keys of half a step."""
WHOLE = 2 * HALF


class Steps(NamedTuple):
    """Steps over slash blocks.

    Attributes:
      starts: int32 [B, N, C, 2], where the keys of each half begin, relative to the tile's first query; -FAR behind.
        In whole steps the second half begins where the first ends.
      bounds: int32 [B, N, Tq, 3], places in a tile's list: steps before the first and from the second to the third need
        a mask, those between need none, those from the third on are not taken.
    """

    starts: Array
    bounds: Array


def slash_steps(
    layout: SparseLayout, q_offset: Array, kv_len: Array, q_len: int, tiles: TileConfig
) -> tuple[Steps, Steps | None]:
    """The whole and the split steps of every head's slash blocks; no split ones where tiles have 128 queries.

    Args:
      layout: of B sequences and N heads, built for ``tiles``.
      q_offset: int32 [B]. kv_len: int32 [B]. q_len: T.
      tiles: 64 queries by 64 keys, or 128 by 128.
    """
    starts = tile_starts(q_offset, q_len, TileConfig(block_q=WHOLE))
    used = jnp.arange(layout.offsets.shape[-1]) < layout.offset_counts[..., None]
    offsets = jnp.where(used, layout.offsets, -FAR)

    def bounded(halves: tuple[Array, ...], is_split: bool) -> Steps:
        first, second = halves
        bounds = _bounds(first, second, is_split, layout.windows, starts, kv_len)
        return Steps(jnp.stack([first, second], axis=-1), bounds)

    if tiles.block_q == WHOLE:
        return bounded((offsets, jnp.where(used, offsets + HALF, -FAR)), is_split=False), None
    whole, split = _whole_and_split(offsets, used)
    return bounded(whole, is_split=False), bounded(split, is_split=True)


def _whole_and_split(offsets: Array, used: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Shares the blocks that both warpgroups need.

    Blocks side by side form a chain of n. With the first one's place as 1, warpgroup 0 needs places 1 to n and
    warpgroup 1, which stands one block later, places 0 to n - 1. Places 2 and 3, 4 and 5, ... lie in whole steps, read
    as pairs (1, 2), (3, 4), ... of places that both need; what is left goes in split steps: (n, 0), and (n - 1, n - 1)
    where n is even.
    """
    capacity = offsets.shape[-1]
    place = jnp.arange(capacity, dtype=jnp.int32)
    before = jnp.concatenate([jnp.full_like(offsets[..., :1], FAR), offsets[..., :-1]], axis=-1)
    follows = used & (offsets == before - HALF)
    goes_on = jnp.concatenate([follows[..., 1:], jnp.zeros_like(follows[..., :1])], axis=-1)
    axis = offsets.ndim - 1
    first = lax.cummax(jnp.where(used & ~follows, place, -1), axis=axis)
    last = lax.cummin(jnp.where(used & ~goes_on, place, capacity), axis=axis, reverse=True)
    within, size = place - first, last - first + 1
    is_whole = used & (within % 2 == 1) & (within <= size - 2)
    is_even = size % 2 == 0
    is_last = used & ~goes_on
    is_split = is_last | (used & is_even & (within == size - 2))
    newest = offsets + (within + 1) * HALF  # place 0 of the chain
    is_doubled = is_last & is_even
    oldest = jnp.where(is_last, offsets, offsets - HALF)
    split = (jnp.where(is_doubled, before, oldest), jnp.where(is_doubled, before, newest))

    def chosen(mask: Array, *values: Array, room: int) -> tuple[Array, ...]:
        at = compact(mask, room)
        return tuple(
            jnp.where(at == FAR, -FAR, jnp.take_along_axis(x, jnp.minimum(at, capacity - 1), axis=-1)) for x in values
        )

    whole = chosen(is_whole, offsets, offsets + HALF, room=capacity // 2 + 1)
    return whole, chosen(is_split, *split, room=capacity)


def _bounds(first: Array, second: Array, is_split: bool, windows: Array, starts: Array, kv_len: Array) -> Array:
    """Where the lists of steps [B, N, C] stop needing a mask, need one again, and end, for tiles that start there."""
    starts = starts[:, None]
    # Keys relative to the first query of the warpgroup that uses them.
    newest = (jnp.maximum(first, second - HALF) if is_split else second) + HALF - 1
    oldest = jnp.minimum(first, second - HALF) if is_split else first - HALF
    place = jnp.arange(1, first.shape[-1] + 1, dtype=jnp.int32)
    total = jnp.where(starts < kv_len[:, None, None], count_above(second, -starts - HALF), 0)
    near = jnp.minimum(jnp.where(newest > 0, place, 0).max(axis=-1)[..., None], total)
    axis = first.ndim - 1
    in_window = (lax.cummin(oldest, axis=axis) >= HALF - windows[..., None]).sum(axis=-1, dtype=jnp.int32)[..., None]
    inside = jnp.minimum(count_above(lax.cummin(jnp.minimum(first, second), axis=axis), -starts - 1), in_window)
    return jnp.stack([near, jnp.clip(inside, near, total), total], axis=-1)


def listed_bounds(layout: SparseLayout, q_offset: Array, kv_len: Array, q_len: int, tiles: TileConfig) -> Array:
    """As ``Steps.bounds``, for a step over the next block that each warpgroup lists: int32 [B, N, Tq, 3]."""
    inside, total = listed_counts(layout, tile_starts(q_offset, q_len, tiles), kv_len, tiles)
    if tiles.block_q == HALF:
        room = [(0, 0), (0, 0), (0, total.shape[-1] % 2)]
        last = [jnp.pad(x, room).reshape(*x.shape[:2], -1, 2) for x in (inside, total)]
        inside, total = last[0].min(axis=-1), last[1].max(axis=-1)
    return jnp.stack([jnp.zeros_like(total), inside, total], axis=-1)


class Columns(NamedTuple):
    """Columns side by side, in steps of 128.

    Attributes:
      k, v: [B, N, C, H], C a multiple of 128.
      first_rows: bfloat16 [B, N, Tq, 2, C], see ``first_rows``.
      steps: int32 [B, N, Tq], those that a tile takes.
    """

    k: Array
    v: Array
    first_rows: Array
    steps: Array


def columns_of(
    k: Array, v: Array, layout: SparseLayout, *, q_offset: Array, kv_len: Array, q_len: int, tiles: TileConfig
) -> Columns | None:
    """The columns of every head, or None where no head may have any; arguments as in ``slash_steps``.

    k, v: [B, S, K, H], N a multiple of K.
    """
    if not layout.columns.shape[-1]:
        return None
    columns_k, columns_v, positions = side_by_side(k, v, layout, WHOLE)
    counts = columns_before(positions, tile_starts(q_offset, q_len, TileConfig(block_q=WHOLE)), WHOLE, kv_len)
    rows = first_rows(positions, layout, q_offset, q_len, k.shape[1], tiles)
    return Columns(columns_k, columns_v, rows, (counts + WHOLE - 1) // WHOLE)


def first_rows(
    positions: Array, layout: SparseLayout, q_offset: Array, q_len: int, kv_capacity: int, tiles: TileConfig
) -> Array:
    """The first query of a warpgroup that counts a column: bfloat16 [B, N, Tq, 2, C], from 0 to 64 = none.

    positions: int32 [B, N, C], of the columns, then FAR.

    A column that lies in a slash block of its tile is counted by the block up to the window's edge, by the column from
    there on.
    """
    block = tiles.block_kv  # = block_q
    shift = block.bit_length() - 1  # of block = 1 << shift
    halves = tile_starts(q_offset, -(-q_len // WHOLE) * WHOLE, TileConfig())  # [B, 2 Tq]
    tile = q_offset[:, None] + (halves - q_offset[:, None]) // block * block
    # A key of a tile has the place block - 1 + (tile start - key), and a slash block begins at place -offset. Blocks
    # don't overlap, so at most one begins in a row of ``block`` places.
    num_rows = (kv_capacity + block) // block + 2
    is_offset = jnp.arange(layout.offsets.shape[-1]) < layout.offset_counts[..., None]
    begins = jnp.where(is_offset, -layout.offsets, num_rows * block)
    of_head = (jnp.arange(positions.shape[0])[:, None, None], jnp.arange(positions.shape[1])[:, None])
    begin = jnp.full((*positions.shape[:2], num_rows), block, jnp.int32)
    begin = begin.at[(*of_head, begins >> shift)].set(begins & (block - 1), mode="drop")  # in its row; ``block`` = none
    goes_on = jnp.pad(begin[..., :-1] & (block - 1), [(0, 0), (0, 0), (1, 0)])  # where the row before's ends
    places = jnp.arange(block)
    covered = (places >= begin[..., None]) | (places < goes_on[..., None])
    bits = covered.reshape(*positions.shape[:2], -1, 32) << jnp.arange(32, dtype=jnp.uint32)  # a word for 32 places
    words = bits.sum(axis=-1, dtype=jnp.uint32)
    place = block - 1 + tile[:, None, :, None] - positions[:, :, None]  # [B, N, 2 Tq, C]
    at = (*(x[..., None] for x in of_head), jnp.clip(place >> 5, 0, words.shape[-1] - 1))
    word = words.at[at].get(mode="promise_in_bounds")
    covered = (word >> (place & 31).astype(jnp.uint32)) & 1 == 1
    window = jnp.clip(layout.windows, 0, kv_capacity + WHOLE)[..., None, None]
    first = jnp.clip(positions[:, :, None] + jnp.where(covered, window, 0) - halves[:, None, :, None], 0, HALF)
    return first.astype(jnp.bfloat16).reshape(*positions.shape[:2], -1, 2, positions.shape[-1])

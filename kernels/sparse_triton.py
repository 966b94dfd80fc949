"""Dense and sparse attention as one Pallas kernel, lowered through Triton: NVIDIA GPUs from Ampere on.

All heads and sequences of a layer go in one launch; what differs between heads is data. A program computes one query
tile of one head: first the blocks in which a row might not see a key, with a mask, then those that all rows see
wholly, without one, then the columns, which are copied side by side once per head. Where a slash block of the tile
holds a column too, the block counts it and the column does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from minference_jax.kernels.layouts import (
    FAR,
    SparseLayout,
    columns_before,
    count_above,
    everything,
    listed_counts,
    side_by_side,
    tile_starts,
)
from minference_jax.kernels.softmax import may_matter
from minference_jax.kernels.tiles import TileConfig, check_head_dim


class _Blocks(NamedTuple):
    """Blocks that programs read.

    Attributes:
      starts: slash blocks as int32 [B, N, C], relative to the tile's start, descending, then -FAR; or listed blocks as
        ids, int32 [B, N, Tq, C].
      bounds: int32 [B, N, Tq, 3], three places in a tile's list: blocks before the first and from the second to the
        third need a mask, those between need none, those from the third on are not read.
    """

    starts: Array
    bounds: Array


class _Columns(NamedTuple):
    """Columns side by side.

    Attributes:
      k, v: [B, N, C, H].
      positions: int32 [B, N, C], then FAR.
      covers: int32 [B, N, places // block_kv], where slash blocks begin: see ``_columns``.
      counts: int32 [B, N, Tq], columns that a tile reads.
    """

    k: Array
    v: Array
    positions: Array
    covers: Array
    counts: Array


def dense(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    skip_threshold: float | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Causal attention of a query chunk over a cache; arguments and results as in ``attention``."""
    layout = everything(q.shape[0], q.shape[2], q.shape[1], k.shape[1], tiles)
    where: dict[str, Any] = {"q_offset": q_offset, "kv_len": kv_len, "tiles": tiles, "interpret": interpret}
    return attention(q, k, v, layout, scale=scale, skip_threshold=skip_threshold, **where)


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
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Attention over exactly the pairs of ``layout_mask(layout)``.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. float32, bfloat16 or float16; scores and sums are float32.
      layout: of B sequences and N heads, built for ``tiles``.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys; rows at positions >= kv_len are padding.
      tiles: tile sizes.
      skip_threshold: as in ``minference_jax.attention``; a tile is ``block_q`` queries by ``block_kv`` keys or columns.
      interpret: run in Pallas' interpreter, which needs no GPU and is slow: for tests.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; padding gives zeros and -inf.

    Raises:
      NotImplementedError: head_dim is not a multiple of 16 from 16 to 256, or tiles are smaller than 16.
    """
    batch, q_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    group_size = num_heads // num_kv_heads
    check_head_dim(head_dim)
    if tiles.block_kv < 16:
        raise NotImplementedError(f"block_kv={tiles.block_kv} must be at least 16")
    slashes, listed = _blocks(layout, q_offset, kv_len, q_len, tiles)
    columns = _columns(k, v, layout, q_offset, kv_len, q_len, tiles)

    def per_head(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:  # [B, N, ...], one head's part
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda g, t, h, b: (b, h * group_size + g, *[0] * (x.ndim - 2)))

    def shared(size: int, of_group: bool) -> pl.BlockSpec:  # [B, T or S, N or K, H], one head's part
        return pl.BlockSpec(
            (None, size, None, head_dim), lambda g, t, h, b: (b, 0, h if of_group else h * group_size + g, 0)
        )

    inputs = (slashes, listed, columns, layout.windows[..., None])
    lengths = jnp.stack([q_offset, kv_len], axis=-1)
    out, lse = pl.pallas_call(
        functools.partial(_attention_kernel, scale=scale, tiles=tiles, skip_threshold=skip_threshold),
        # Programs start in the order of the grid, its first axis fastest: the heads of a group share their keys in the
        # L2 cache, and the longest tiles start first.
        grid=(group_size, slashes.bounds.shape[2], num_kv_heads, batch),
        in_specs=[
            shared(q_len, of_group=False),
            shared(k.shape[1], of_group=True),
            shared(k.shape[1], of_group=True),
            pl.BlockSpec((None, 2), lambda g, t, h, b: (b, 0)),
            jax.tree.map(per_head, inputs),
        ],
        out_specs=[shared(q_len, of_group=False), per_head(jax.ShapeDtypeStruct((batch, num_heads, q_len), q.dtype))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, q_len), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="sparse_attention",
    )(q, k, v, lengths, inputs)
    return out, lse.swapaxes(1, 2)


def _blocks(layout: SparseLayout, q_offset, kv_len, q_len: int, tiles: TileConfig) -> tuple[_Blocks, _Blocks | None]:
    """The slash blocks of every head, and the listed blocks of every tile, None where no head may list any."""
    block_q, block_kv = tiles.block_q, tiles.block_kv
    used = jnp.arange(layout.offsets.shape[-1]) < layout.offset_counts[..., None]
    offsets = jnp.where(used, layout.offsets, -FAR)
    starts = jnp.broadcast_to(tile_starts(q_offset, q_len, tiles)[:, None], layout.block_counts.shape)
    is_real = starts < kv_len[:, None, None]
    total = jnp.where(is_real, count_above(offsets, -starts - block_kv), 0)
    diagonal = jnp.minimum((offsets > 1 - block_kv).sum(axis=-1, dtype=jnp.int32)[..., None], total)
    inside = count_above(offsets, jnp.maximum(-starts, block_q - layout.windows[..., None]) - 1)
    slashes = _Blocks(offsets, jnp.stack([diagonal, jnp.clip(inside, diagonal, total), total], axis=-1))
    if not layout.block_ids.shape[-1]:
        return slashes, None
    inside, total = listed_counts(layout, tile_starts(q_offset, q_len, tiles), kv_len, tiles)
    return slashes, _Blocks(layout.block_ids, jnp.stack([jnp.zeros_like(total), inside, total], axis=-1))


def _columns(k, v, layout: SparseLayout, q_offset, kv_len, q_len: int, tiles: TileConfig) -> _Columns | None:
    """The columns of every head side by side, or None where no head may have any.

    A key of a tile has the place block_q - 1 + (tile start - key). Slash blocks hold ``block_kv`` places each and do
    not overlap, so at most one begins in each stretch of ``block_kv`` places: ``covers`` says where in it, or -1.
    """
    if not layout.columns.shape[-1]:
        return None
    batch, num_heads, _ = layout.columns.shape
    block_q, block_kv = tiles.block_q, tiles.block_kv
    columns_k, columns_v, positions = side_by_side(k, v, layout, block_kv)
    counts = columns_before(positions, tile_starts(q_offset, q_len, tiles), block_q, kv_len)
    rows = (jnp.arange(batch)[:, None, None], jnp.arange(num_heads)[:, None])
    size = (k.shape[1] + block_q) // block_kv + 2
    used = jnp.arange(layout.offsets.shape[-1]) < layout.offset_counts[..., None]
    begins = block_q - block_kv - layout.offsets
    stretch = jnp.where(used, begins // block_kv, size)
    covers = jnp.full((batch, num_heads, size), -1, jnp.int32)
    covers = covers.at[(*rows, stretch)].set(begins % block_kv, mode="drop")
    return _Columns(columns_k, columns_v, positions, covers, counts)


def head_parts(head_dim: int) -> list[Any]:
    """Splits head_dim into powers of two, the largest first: sizes inside a kernel must be such.

    Raises:
      ValueError: matrix products can't take it: it is no multiple of 16, or 512 or more.
    """
    parts, at = [], 0
    for bit in reversed(range(4, 9)):
        if head_dim & (1 << bit):
            parts.append(pl.ds(at, 1 << bit))
            at += 1 << bit
    if at != head_dim:
        raise ValueError(f"{head_dim=} must be a multiple of 16 below 512")
    return parts


def dot(x: Array, y: Array) -> Array:
    """Matrix product in float32; float32 operands are not rounded to tf32."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


class _Accumulator(NamedTuple):
    """Online softmax of one query tile: rows R, in parts of head_dim; scores in units of log 2.

    Attributes:
      top: float32 [R], largest score. total: float32 [R], sum of weights. out: sums of weight * value, each [R, part].
    """

    top: Array
    total: Array
    out: tuple[Array, ...]


class _Skip(NamedTuple):
    """When a block is left out.

    Attributes:
      log2_threshold: of the weight below which all pairs of the block must lie.
      is_real: bool [R], the rows that have a say in it: those that are no padding.
    """

    log2_threshold: float
    is_real: Array


def _add(
    acc: _Accumulator,
    q: tuple,
    keys: tuple,
    values: tuple | Callable[[], tuple],
    scale: float,
    seen: Array | None,
    skip: _Skip | None,
) -> _Accumulator:
    """Adds a block of keys; ``seen`` bool [R, W] or None = all; where blocks are skipped, a call loads the values."""
    scores: Any = sum(dot(rows, part.T) for rows, part in zip(q, keys, strict=True)) * scale
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)

    def add(acc: _Accumulator) -> _Accumulator:
        parts = values() if callable(values) else values
        top = jnp.maximum(acc.top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - top[:, None])
        decay = jnp.exp2(acc.top - top)
        total = acc.total * decay + jnp.sum(weights, axis=1)
        weights = weights.astype(parts[0].dtype)
        pairs = zip(acc.out, parts, strict=True)
        return _Accumulator(top, total, tuple(out * decay[:, None] + dot(weights, part) for out, part in pairs))

    if skip is None:
        return add(acc)
    votes = jnp.where(skip.is_real, may_matter(scores, acc.top, skip.log2_threshold), 0)
    return lax.cond(jnp.max(votes) > 0, add, lambda acc: acc, acc)


def _attention_kernel(
    q_ref,
    k_ref,
    v_ref,
    lengths_ref,
    inputs,
    out_ref,
    lse_ref,
    *,
    scale: float,
    tiles: TileConfig,
    skip_threshold: float | None,
):
    """One program: a query tile of one head."""
    slashes, listed, columns, window_ref = inputs
    block_q, block_kv = tiles.block_q, tiles.block_kv
    parts = head_parts(q_ref.shape[1])
    tile = pl.num_programs(1) - 1 - pl.program_id(1)
    q_offset, kv_len, window = lengths_ref[0], lengths_ref[1], window_ref[0]
    start = q_offset + tile * block_q
    row = start + jnp.arange(block_q)
    in_chunk = tile * block_q + jnp.arange(block_q) < q_ref.shape[0]
    sign = (scale > 0) - (scale < 0)  # the softmax below wants a positive scale
    exponent_scale = abs(scale) * math.log2(math.e) if sign else 1.0

    def load_q(part):
        q = pltriton.load(q_ref.at[pl.ds(tile * block_q, block_q), part], mask=in_chunk[:, None], other=0.0)
        return q if sign == 1 else q * sign

    skip = None if skip_threshold is None else _Skip(math.log2(skip_threshold), in_chunk & (row < kv_len))
    add = functools.partial(_add, q=tuple(load_q(part) for part in parts), scale=exponent_scale, skip=skip)
    later = (lambda read, ref: read(ref)) if skip is None else functools.partial

    def add_blocks(acc, bounds, block_start):
        masked, inside, end = (bounds[tile, i] for i in range(3))

        def add_edge(i, acc):
            first = block_start(jnp.where(i < masked, i, i - masked + inside))
            at = jnp.maximum(first, 0)
            key = at + jnp.arange(block_kv)
            load = functools.partial(pltriton.load, mask=(key < kv_len)[:, None], other=0.0)
            read = lambda x: tuple(load(x.at[pl.ds(at, block_kv), part]) for part in parts)  # noqa: E731
            k, v = read(k_ref), later(read, v_ref)
            key = jnp.where((key < first + block_kv) & (key < kv_len), key, FAR)
            return add(acc, keys=k, values=v, seen=(row[:, None] >= key) & (row[:, None] - key < window))

        def add_inner(j, acc):
            at = pl.ds(block_start(j), block_kv)
            read = lambda x: tuple(x[at, part] for part in parts)  # noqa: E731
            return add(acc, keys=read(k_ref), values=later(read, v_ref), seen=None)

        acc = lax.fori_loop(0, masked + end - inside, add_edge, acc)
        return lax.fori_loop(masked, inside, add_inner, acc) if k_ref.shape[0] >= block_kv else acc

    def add_columns(i, acc):
        at = pl.ds(i * block_kv, block_kv)
        read = lambda x: tuple(x[at, part] for part in parts)  # noqa: E731
        k, v = read(columns.k), later(read, columns.v)
        position = columns.positions[at]
        reach = start + block_q - 1 - position
        place = jnp.maximum(reach, 0)
        here, within = place // block_kv, place % block_kv
        begins, began = columns.covers[here], columns.covers[jnp.maximum(here - 1, 0)]
        is_covered = ((begins >= 0) & (begins <= within)) | ((here > 0) & (began > within))
        # The block that covers a column counts it up to the window's edge, the column from there on.
        first_row = position + jnp.where(is_covered & (reach >= 0), window, 0)
        return add(acc, keys=k, values=v, seen=row[:, None] >= first_row)

    acc = _Accumulator(
        jnp.full((block_q,), jnp.finfo(jnp.float32).min / 2),
        jnp.zeros((block_q,), jnp.float32),
        tuple(jnp.zeros((block_q, part.size), jnp.float32) for part in parts),
    )
    acc = add_blocks(acc, slashes.bounds, lambda j: start + slashes.starts[j])
    if listed is not None:
        acc = add_blocks(acc, listed.bounds, lambda j: listed.starts[tile, j] * block_kv)
    if columns is not None:
        acc = lax.fori_loop(0, (columns.counts[tile] + block_kv - 1) // block_kv, add_columns, acc)
    is_real = (row < kv_len) & (acc.total != 0)
    total = jnp.where(is_real, acc.total, 1.0)
    is_real &= window >= 0
    nothing = jnp.sqrt(jnp.minimum(window, 0).astype(jnp.float32))  # NaN where the window says so, else 0
    at = pl.ds(tile * block_q, block_q)
    for out, part in zip(acc.out, parts, strict=True):
        out = jnp.where(is_real[:, None], out / total[:, None], nothing).astype(out_ref.dtype)
        pltriton.store(out_ref.at[at, part], out, mask=in_chunk[:, None])
    lse = jnp.where(is_real, (acc.top + jnp.log2(total)) * math.log(2), nothing - jnp.inf)
    pltriton.store(lse_ref.at[at], lse, mask=in_chunk)

"""From a pattern per head to the layout a kernel reads: estimate, choose, lay out."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from minference_jax import estimate
from minference_jax.kernels.layouts import FAR, SparseLayout, compact, density, make_dense, slash_offsets
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import PatternArrays, PatternKind


def build_layout(
    q: Array,
    k: Array,
    pattern: PatternArrays,
    *,
    scale: float,
    kv_len: Array,
    q_offset: Array,
    tiles: TileConfig,
    max_num_blocks: int,
) -> SparseLayout:
    """Estimates what each head of a layer keeps and lays it out for the kernels, all heads at once.

    Kinds that no head has cost nothing at run time. A vertical-slash head whose tiles would cost as much as dense
    attention becomes dense.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      pattern: int32 [N], one entry per query head.
      scale: multiplies the scores.
      kv_len: int32 [B], valid keys. q_offset: int32 [B], absolute position of the first query.
      tiles: tile sizes of the kernel.
      max_num_blocks: static capacity of a block-sparse head's lists; what a head keeps beyond it is lost.

    Returns:
      SparseLayout of B sequences and N heads.
    """
    batch, num_heads, size = q.shape[0], q.shape[2], k.shape[1]
    kv_len = jnp.minimum(kv_len, q_offset + q.shape[1])  # no query of this chunk sees further
    kind = pattern.kind[:, None]
    index = jnp.arange(size, dtype=jnp.int32)

    def estimated():
        return estimate.vertical_slash(
            q,
            k,
            vertical_size=jnp.asarray(pattern.vertical_size),
            slash_size=jnp.asarray(pattern.slash_size),
            scale=scale,
            q_offset=q_offset,
            kv_len=kv_len,
        )

    def nothing():
        none = jnp.zeros((batch, num_heads, size), bool)
        return estimate.VerticalSlashIndices(none, none)

    chosen = lax.cond((kind == PatternKind.VERTICAL_SLASH).any(), estimated, nothing)
    is_vertical_slash, is_a_shape = kind == PatternKind.VERTICAL_SLASH, kind == PatternKind.A_SHAPE
    verticals = (chosen.verticals & is_vertical_slash) | ((index < pattern.sink_size[:, None]) & is_a_shape)
    slashes = (chosen.slashes & is_vertical_slash) | ((index < pattern.window_size[:, None]) & is_a_shape)
    slashes |= kind == PatternKind.DENSE
    verticals &= index < kv_len[:, None, None]
    slashes &= index < kv_len[:, None, None]
    blocks = _block_lists(q, k, pattern, kv_len, q_offset, tiles, max_num_blocks)
    offsets, offset_counts = slash_offsets(slashes, tiles)
    windows = jnp.where(pattern.kind == PatternKind.A_SHAPE, pattern.window_size, FAR).astype(jnp.int32)
    layout = SparseLayout(
        offsets=offsets,
        offset_counts=offset_counts,
        columns=compact(verticals, size),
        column_counts=verticals.sum(axis=-1, dtype=jnp.int32),
        windows=jnp.broadcast_to(windows, (batch, num_heads)),
        block_ids=blocks.block_ids,
        block_counts=blocks.block_counts,
    )
    # Scattered slashes on a short prompt can cost more tiles than dense: then dense is both cheaper and exact.
    costs_dense = density(layout, q_offset, kv_len, q.shape[1], tiles) >= 1
    return make_dense(layout, costs_dense & is_vertical_slash[:, 0], size, tiles)


def _block_lists(q, k, pattern, kv_len, q_offset, tiles, max_num_blocks) -> estimate.BlockSparseIndices:
    batch, q_len, num_heads, _ = q.shape
    own = tiles.block_q // tiles.block_kv + 1  # blocks that hold a tile's own positions, kept whatever was asked for
    capacity = min(max(max_num_blocks, own), -(-k.shape[1] // tiles.block_kv))
    is_block_sparse = pattern.kind == PatternKind.BLOCK_SPARSE

    def estimated():
        found = estimate.block_sparse(
            q, k, num_blocks=pattern.num_blocks, capacity=capacity, q_offset=q_offset, kv_len=kv_len, tiles=tiles
        )
        return found._replace(block_counts=jnp.where(is_block_sparse[:, None], found.block_counts, 0))

    def nothing():
        shape = (batch, num_heads, -(-q_len // tiles.block_q))
        return estimate.BlockSparseIndices(jnp.full((*shape, capacity), FAR, jnp.int32), jnp.zeros(shape, jnp.int32))

    return lax.cond(is_block_sparse.any(), estimated, nothing)

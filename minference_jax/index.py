"""From a pattern per head to the layout a kernel reads: estimate, choose, lay out."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from minference_jax import estimate
from minference_jax.estimate import NUM_BLOCKS_UNIT
from minference_jax.kernels.layouts import FAR, SparseLayout, compact, costs_dense, density, make_dense, slash_offsets
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import PatternArrays, PatternKind, SlashGranularity


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
    max_num_columns: int,
    slash_granularity: SlashGranularity = "line",
    kernels: estimate.EstimateKernels = estimate.XLA,
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
      max_num_blocks: static capacity of a block-sparse head's lists; what a head keeps beyond it is lost. 0 = no head
        is block-sparse.
      max_num_columns: static capacity of a head's columns (verticals, sinks); what a head keeps beyond it is lost.
      slash_granularity: "line" or "block": single distances, or whole block diagonals of ``tiles.block_kv`` keys.
      kernels: what estimation runs.

    Returns:
      SparseLayout of B sequences and N heads.
    """
    kv_len = jnp.minimum(kv_len, q_offset + q.shape[1])  # no query of this chunk sees further
    pattern = _within(pattern, k.shape[1])
    verticals, slashes = _verticals_and_slashes(
        q, k, pattern, scale, kv_len, q_offset, tiles.block_kv if slash_granularity == "block" else None, kernels
    )
    offsets, offset_counts = slash_offsets(slashes, tiles, slash_granularity == "block")
    blocks = _block_lists(q, k, pattern, scale, kv_len, q_offset, tiles, max_num_blocks, kernels)
    windows = jnp.where(pattern.kind == PatternKind.A_SHAPE, pattern.window_size, FAR).astype(jnp.int32)
    column_counts = jnp.minimum(verticals.sum(axis=-1, dtype=jnp.int32), max_num_columns)
    layout = SparseLayout(
        offsets=offsets,
        offset_counts=offset_counts,
        columns=compact(verticals, min(max_num_columns, k.shape[1])),
        column_counts=column_counts,
        windows=jnp.broadcast_to(windows, column_counts.shape),
        block_ids=blocks.block_ids,
        block_counts=blocks.block_counts,
    )
    # Scattered slashes on a short prompt can cost more tiles than dense: then dense is both cheaper and exact.
    dense = costs_dense(density(layout, q_offset, kv_len, q.shape[1], tiles))
    return make_dense(layout, dense & (pattern.kind == PatternKind.VERTICAL_SLASH), k.shape[1], tiles)


def _within(pattern: PatternArrays, size: int) -> PatternArrays:
    """The pattern with no size beyond ``size`` keys, which keep all there is: sums of sizes then fit an integer."""
    tokens = {name: jnp.minimum(x, size) for name, x in pattern._asdict().items() if name.endswith("_size")}
    return pattern._replace(**tokens, num_blocks=jnp.minimum(pattern.num_blocks, -(-size // NUM_BLOCKS_UNIT)))


def _verticals_and_slashes(q, k, pattern, scale, kv_len, q_offset, slash_block, kernels) -> tuple[Array, Array]:
    """The keys and the distances, or block diagonals, of all heads but the block-sparse: bool [B, N, ...] each."""
    batch, num_heads, size = q.shape[0], q.shape[2], k.shape[1]
    kind = pattern.kind[:, None]
    is_vertical_slash, is_a_shape = kind == PatternKind.VERTICAL_SLASH, kind == PatternKind.A_SHAPE
    num_slashes = size if slash_block is None else estimate.num_diagonals(size, slash_block)

    def estimated():
        sizes = {"vertical_size": pattern.vertical_size, "slash_size": pattern.slash_size}
        where = {"scale": scale, "q_offset": q_offset, "kv_len": kv_len, "slash_block": slash_block}
        return estimate.vertical_slash(q, k, **sizes, **where, kernels=kernels)

    def nothing():
        none = (jnp.zeros((batch, num_heads, n), bool) for n in (size, num_slashes))
        return estimate.VerticalSlashIndices(*none)

    chosen = lax.cond(is_vertical_slash.any(), estimated, nothing)
    key, slash = (jnp.arange(n, dtype=jnp.int32) for n in (size, num_slashes))
    verticals = (chosen.verticals & is_vertical_slash) | ((key < pattern.sink_size[:, None]) & is_a_shape)
    window = pattern.window_size[:, None]
    window = window if slash_block is None else estimate.blocks_of(window, slash_block)
    slashes = (chosen.slashes & is_vertical_slash) | ((slash < window) & is_a_shape) | (kind == PatternKind.DENSE)
    reach = slash if slash_block is None else (slash - 1) * slash_block
    return verticals & (key < kv_len[:, None, None]), slashes & (reach < kv_len[:, None, None])


def _block_lists(q, k, pattern, scale, kv_len, q_offset, tiles, max_num_blocks, kernels) -> estimate.BlockSparseIndices:
    batch, q_len, num_heads, _ = q.shape
    if max_num_blocks == 0:
        shape = (batch, num_heads, -(-q_len // tiles.block_q))
        return estimate.BlockSparseIndices(jnp.zeros((*shape, 0), jnp.int32), jnp.zeros(shape, jnp.int32))
    num_blocks, max_num_blocks = (
        -(-n * NUM_BLOCKS_UNIT // tiles.block_kv) for n in (pattern.num_blocks, max_num_blocks)
    )
    forced = tiles.block_q // tiles.block_kv + 2  # the first block and a tile's own, kept whatever was asked for
    capacity = min(max(max_num_blocks, forced), -(-k.shape[1] // tiles.block_kv))
    is_block_sparse = pattern.kind == PatternKind.BLOCK_SPARSE

    def estimated():
        where = {"scale": scale, "q_offset": q_offset, "kv_len": kv_len, "tiles": tiles, "kernels": kernels}
        found = estimate.block_sparse(q, k, num_blocks=num_blocks, capacity=capacity, **where)
        return found._replace(block_counts=jnp.where(is_block_sparse[:, None], found.block_counts, 0))

    def nothing():
        shape = (batch, num_heads, -(-q_len // tiles.block_q))
        return estimate.BlockSparseIndices(jnp.full((*shape, capacity), FAR, jnp.int32), jnp.zeros(shape, jnp.int32))

    return lax.cond(is_block_sparse.any(), estimated, nothing)

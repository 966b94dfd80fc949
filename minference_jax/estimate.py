"""Cheap estimates of what each head attends to: the last queries against all keys, and block means.

Shape letters: B batch, T queries, S keys, N query heads, K KV heads, G = N // K, H head_dim, Tq query tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels.layouts import compact, tile_starts
from minference_jax.kernels.tiles import TileConfig

LAST_Q = 64
"""Queries at the end of the prompt whose attention stands for all."""
MIN_VERTICALS, MIN_SLASHES = 30, 50
"""Least number of verticals and slashes of a vertical-slash head."""
FORCED_VERTICALS, FORCED_SLASHES = 30, 100
"""First keys and nearest distances that are chosen before all others."""


class VerticalSlashIndices(NamedTuple):
    """What vertical-slash heads keep.

    Attributes:
      verticals: bool [B, N, S], True where a key is kept for every later query.
      slashes: bool [B, N, S], True at a distance (query position minus key position) that is kept for every query.
    """

    verticals: Array
    slashes: Array


class BlockSparseIndices(NamedTuple):
    """What block-sparse heads keep.

    Attributes:
      block_ids: int32 [B, N, Tq, C], key blocks of each query tile, ascending, then FAR.
      block_counts: int32 [B, N, Tq], used entries.
    """

    block_ids: Array
    block_counts: Array


def top_k_mask(scores: Array, k: Array) -> Array:
    """Marks the k largest entries of the last axis; of equal ones the first.

    The threshold is found bit by bit on the order-preserving integer form of the floats, so k can be a traced array
    and nothing is sorted.

    Args:
      scores: float32 [..., M], no NaN.
      k: int32 [...], between 0 and M.

    Returns:
      bool [..., M] with exactly k entries True in each row.
    """
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.uint32)  # + 0.0 makes -0.0 equal 0.0
    keys = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))

    def refine(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = (keys >= candidate[..., None]).sum(axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros(k.shape, jnp.uint32))[..., None]
    above, ties = keys > threshold, keys == threshold
    missing = k - above.sum(axis=-1, dtype=jnp.int32)
    return (above | (ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= missing[..., None]))) & (k > 0)[..., None]


def last_queries(q: Array, q_offset: Array, kv_len: Array) -> tuple[Array, Array]:
    """The last LAST_Q valid queries of each sequence.

    Args:
      q: [B, T, N, H]. q_offset, kv_len: int32 [B].

    Returns:
      float32 [B, LAST_Q, N, H] and their absolute positions int32 [B, LAST_Q]; where a sequence has fewer, the
      first ones are repeats with position -1, which sees no key.
    """
    positions = kv_len[:, None] - LAST_Q + jnp.arange(LAST_Q, dtype=jnp.int32)
    index = positions - q_offset[:, None]
    rows = jnp.take_along_axis(q, jnp.clip(index, 0, q.shape[1] - 1)[:, :, None, None], axis=1)
    return rows.astype(jnp.float32), jnp.where((index >= 0) & (index < q.shape[1]), positions, -1)


def vertical_slash_scores(q: Array, k: Array, *, scale: float, q_offset: Array, kv_len: Array) -> tuple[Array, Array]:
    """Attention mass of the last queries per key and per distance.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query. kv_len: int32 [B], valid keys.

    Returns:
      float32 [B, N, S] summed over the queries for each key, and the same for each distance. Softmax is in float32.

    Source: arXiv 2407.02490, section 3.2 and algorithm 2.
    """
    batch, size, num_kv_heads, head_dim = k.shape
    num_heads = q.shape[2]
    rows, positions = last_queries(q, q_offset, kv_len)
    rows = rows.reshape(batch, LAST_Q, num_kv_heads, -1, head_dim) * scale
    keys = jnp.arange(size, dtype=jnp.int32)

    def group(args):  # one KV head of one sequence: rows [L, G, H], k [S, H]
        rows, k, positions, length = args
        scores = jnp.einsum("lgh,sh->gls", rows, k.astype(jnp.float32), precision="highest")
        seen = keys <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
        weights = jnp.where(seen, weights, 0.0)
        # Shift row l left by l, so that diagonals stand in columns: column c holds key - l = c - (L - 1).
        width = size + 2 * LAST_Q
        skewed = jnp.pad(weights, ((0, 0), (0, 0), (LAST_Q - 1, LAST_Q + 1))).reshape(-1, LAST_Q * width)
        skewed = jnp.pad(skewed, ((0, 0), (0, LAST_Q))).reshape(-1, LAST_Q, width + 1)
        diagonals = skewed.sum(axis=1)  # distance = (length - L + l) - key, so column = length - 1 - distance
        column = length - 1 - keys
        slashes = jnp.where(column >= 0, diagonals[:, jnp.maximum(column, 0)], 0.0)
        return weights.sum(axis=1), slashes

    def flat(x):  # [B, ...] repeated for each KV head
        return jnp.repeat(x, num_kv_heads, axis=0)

    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch * num_kv_heads, LAST_Q, -1, head_dim)
    k = k.swapaxes(1, 2).reshape(batch * num_kv_heads, size, head_dim)
    verticals, slashes = lax.map(group, (rows, k, flat(positions), flat(kv_len)))
    return verticals.reshape(batch, num_heads, size), slashes.reshape(batch, num_heads, size)


def vertical_slash(
    q: Array, k: Array, *, vertical_size: Array, slash_size: Array, scale: float, q_offset: Array, kv_len: Array
) -> VerticalSlashIndices:
    """Chooses the verticals and slashes of every head at once.

    Keys 0..29 and distances 0..99 come first, then the largest attention mass of the last 64 queries. Sizes below 30
    verticals or 50 slashes count as these; sizes above the sequence keep all of it, and the result is dense.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      vertical_size, slash_size: int32 [N], tokens.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query. kv_len: int32 [B], valid keys.

    Returns:
      VerticalSlashIndices of bool [B, N, S].

    Source: arXiv 2407.02490, algorithm 2; the forced and least sizes are those of microsoft/MInference.
    """
    verticals, slashes = vertical_slash_scores(q, k, scale=scale, q_offset=q_offset, kv_len=kv_len)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    valid = index < kv_len[:, None, None]

    def choose(scores, forced, size, least):
        scores = jnp.where(valid, jnp.where(index < forced, jnp.inf, scores), -jnp.inf)
        return top_k_mask(scores, jnp.minimum(kv_len[:, None], jnp.maximum(size, least)))

    return VerticalSlashIndices(
        choose(verticals, FORCED_VERTICALS, vertical_size, MIN_VERTICALS),
        choose(slashes, FORCED_SLASHES, slash_size, MIN_SLASHES),
    )


def _block_means(x: Array, block: int, valid: Array) -> Array:
    """Mean over the valid rows of each block: x [B, T, N, H], valid bool [B, T] -> float32 [B, N, blocks, H]."""
    pad = -x.shape[1] % block
    x = jnp.where(valid[:, :, None, None], x.astype(jnp.float32), 0.0)
    x, valid = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), jnp.pad(valid, ((0, 0), (0, pad)))
    sums = x.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(axis=2)
    counts = valid.reshape(valid.shape[0], -1, block).sum(axis=2)
    return (sums / jnp.maximum(counts, 1)[:, :, None, None]).swapaxes(1, 2)


def block_sparse(
    q: Array, k: Array, *, num_blocks: Array, capacity: int, q_offset: Array, kv_len: Array, tiles: TileConfig
) -> BlockSparseIndices:
    """Chooses the key blocks of every query tile and head by the product of mean queries and mean keys.

    The blocks that hold a tile's own positions are always among them. Means are over valid tokens only.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      num_blocks: int32 [N], blocks of ``tiles.block_kv`` keys per query tile, at most ``capacity``.
      capacity: static length of the lists.
      q_offset: int32 [B], absolute position of the first query. kv_len: int32 [B], valid keys.
      tiles: tile sizes.

    Returns:
      BlockSparseIndices.

    Source: arXiv 2407.02490, algorithm 3; unlike microsoft/MInference the diagonal block is always kept.
    """
    batch, q_len, num_heads, _ = q.shape
    group_size = num_heads // k.shape[2]
    starts = tile_starts(q_offset, q_len, tiles)
    position = q_offset[:, None] + jnp.arange(q_len, dtype=jnp.int32)
    q_means = _block_means(q, tiles.block_q, position < kv_len[:, None])
    k_means = _block_means(k, tiles.block_kv, jnp.arange(k.shape[1]) < kv_len[:, None])
    blocks = jnp.arange(k_means.shape[2], dtype=jnp.int32)

    def tile(args):  # one query tile of one head
        q, index, start, size = args
        batch_index, head = index
        end = jnp.minimum(start + tiles.block_q, kv_len[batch_index])
        scores = jnp.matmul(k_means[batch_index, head // group_size], q, precision="highest")
        own = (blocks >= start // tiles.block_kv) & (blocks * tiles.block_kv < end)
        visible = blocks * tiles.block_kv < end
        scores = jnp.where(visible, jnp.where(own, jnp.inf, scores), -jnp.inf)
        return top_k_mask(scores, jnp.minimum(jnp.maximum(size, own.sum()), visible.sum()).astype(jnp.int32))

    def head(args):
        q, index, starts, size = args
        same = (jnp.broadcast_to(x, (starts.size, *x.shape)) for x in (index, size))
        index, size = same
        kept = lax.map(tile, (q, index, starts, size), batch_size=64)
        return compact(kept, capacity), kept.sum(axis=-1, dtype=jnp.int32)

    index = jnp.stack(jnp.meshgrid(jnp.arange(batch), jnp.arange(num_heads), indexing="ij"), -1).reshape(-1, 2)
    args = (q_means.reshape(-1, *q_means.shape[2:]), index, starts[index[:, 0]], num_blocks[index[:, 1]])
    ids, counts = lax.map(head, args)
    shape = (batch, num_heads, starts.shape[1])
    return BlockSparseIndices(ids.reshape(*shape, capacity), counts.reshape(shape))


__all__ = [
    "LAST_Q",
    "BlockSparseIndices",
    "VerticalSlashIndices",
    "block_sparse",
    "last_queries",
    "top_k_mask",
    "vertical_slash",
    "vertical_slash_scores",
]

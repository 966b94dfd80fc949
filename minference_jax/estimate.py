"""Cheap estimates of what each head attends to: the last queries against all keys, and block means.

Shape letters: B batch, T queries, S keys, N query heads, K KV heads, G = N // K, H head_dim, Tq query tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels import mass_xla, select_xla
from minference_jax.kernels.layouts import compact, tile_starts
from minference_jax.kernels.tiles import TileConfig

LAST_Q = 64
"""Queries at the end of the prompt whose attention stands for all."""
MIN_VERTICALS, MIN_SLASHES = 30, 50
"""Least number of verticals and slashes of a vertical-slash head."""
FORCED_VERTICALS, FORCED_SLASHES = 30, 100
"""First keys and nearest distances that are chosen before all others."""
NUM_BLOCKS_UNIT = 64
"""Keys in one of a block-sparse pattern's ``num_blocks``, whatever the tiles of the kernel."""

SCORES_AT_ONCE = 1 << 24
"""Block scores that block-sparse estimation holds at a time, over all heads."""


class EstimateKernels(NamedTuple):
    """What an implementation brings to estimation.

    Attributes:
      attention_mass: (q, k, positions, *, scale) -> mass per key and per distance; see ``kernels.mass_xla``.
      top_k_mask: (scores, k) -> bool mask of the k largest; see ``kernels.select_xla``.
    """

    attention_mass: Callable[..., tuple[Array, Array]]
    top_k_mask: Callable[[Array, Array], Array]


XLA = EstimateKernels(mass_xla.attention_mass, select_xla.top_k_mask)


class VerticalSlashIndices(NamedTuple):
    """What vertical-slash heads keep.

    Attributes:
      verticals: bool [B, N, S], True where a key is kept for every later query.
      slashes: bool [B, N, S], True at a distance (query position minus key position) that is kept for every query; or
        bool [B, N, num_diagonals(S, block)], True at a block diagonal that is kept.
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


def last_queries(q: Array, q_offset: Array, kv_len: Array) -> tuple[Array, Array]:
    """The last LAST_Q valid queries of each sequence.

    Args:
      q: [B, T, N, H]. q_offset, kv_len: int32 [B].

    Returns:
      [B, LAST_Q, N, H] and their absolute positions int32 [B, LAST_Q]; where a sequence has fewer, the first ones are
      repeats with position -1, which sees no key.
    """
    positions = kv_len[:, None] - LAST_Q + jnp.arange(LAST_Q, dtype=jnp.int32)
    index = positions - q_offset[:, None]
    rows = jnp.take_along_axis(q, jnp.clip(index, 0, q.shape[1] - 1)[:, :, None, None], axis=1)
    return rows, jnp.where((index >= 0) & (index < q.shape[1]), positions, -1)


def vertical_slash(
    q: Array,
    k: Array,
    *,
    vertical_size: Array,
    slash_size: Array,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    slash_block: int | None = None,
    kernels: EstimateKernels = XLA,
) -> VerticalSlashIndices:
    """Chooses the verticals and slashes of every head at once.

    Keys 0..29 and distances 0..99 come first, then the largest attention mass of the last 64 queries. Sizes below 30
    verticals or 50 slashes count as these; sizes above the sequence keep all of it, and the result is dense.

    With ``slash_block`` whole block diagonals take the place of single distances: every query tile reads the
    ``slash_block`` keys that begin d * slash_block before it, for each kept d. As many are kept as so many nearest
    distances would need, by the mass that the verticals leave.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      vertical_size, slash_size: int32 [N], tokens.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query. kv_len: int32 [B], valid keys.
      slash_block: keys per block diagonal; None = single distances.
      kernels: what sums the mass and selects.

    Returns:
      VerticalSlashIndices.

    Source: arXiv 2407.02490, algorithm 2; the forced and least sizes are those of microsoft/MInference. Block
    diagonals are our own.
    """
    size = k.shape[1]
    rows, positions = last_queries(q, q_offset, kv_len)
    key_mass, distance_mass = kernels.attention_mass(rows, k, positions, scale=scale)
    valid = jnp.arange(size, dtype=jnp.int32) < kv_len[:, None, None]

    def force(mass, valid, forced):
        index = jnp.arange(mass.shape[-1], dtype=jnp.int32)
        return jnp.where(valid, jnp.where(index < forced, jnp.inf, mass), -jnp.inf)

    key_mass_or_forced = force(key_mass, valid, FORCED_VERTICALS)
    num_verticals = jnp.minimum(kv_len[:, None], jnp.maximum(vertical_size, MIN_VERTICALS))
    slash_size = jnp.maximum(slash_size, MIN_SLASHES)
    if slash_block is None:  # both at once: there are fewer rows than a GPU has room for
        masses = jnp.stack([key_mass_or_forced, force(distance_mass, valid, FORCED_SLASHES)])
        sizes = jnp.stack([num_verticals, jnp.minimum(kv_len[:, None], slash_size)])
        return VerticalSlashIndices(*kernels.top_k_mask(masses, sizes))
    verticals = kernels.top_k_mask(key_mass_or_forced, num_verticals)
    diagonal = jnp.arange(num_diagonals(size, slash_block), dtype=jnp.int32)
    begin = kv_len[:, None] - LAST_Q - diagonal * slash_block  # of the keys that the last queries' tile reads
    key = begin[..., None] + jnp.arange(slash_block, dtype=jnp.int32)
    left = jnp.where(valid & ~verticals, key_mass, 0.0)
    flat = jnp.clip(key, 0, size - 1).reshape(key.shape[0], 1, -1)
    mass = jnp.take_along_axis(left, flat, axis=-1).reshape(*left.shape[:2], *key.shape[1:])
    mass = jnp.where((key >= 0)[:, None], mass, 0.0).sum(axis=-1)
    valid = (diagonal - 1) * slash_block < kv_len[:, None, None]
    forced, wanted = (blocks_of(n, slash_block) for n in (FORCED_SLASHES, slash_size))
    wanted = jnp.minimum(valid.sum(axis=-1, dtype=jnp.int32), wanted)
    return VerticalSlashIndices(verticals, kernels.top_k_mask(force(mass, valid, forced), wanted))


def num_diagonals(size: int, block: int) -> int:
    """Block diagonals, aligned with the tiles, that hold every distance below ``size``."""
    return -(-size // block) + 1


def blocks_of(distances: Any, block: int) -> Any:
    """How many block diagonals hold so many nearest distances, int or int32 array."""
    return (distances + 2 * block - 2) // block


def _block_means(x: Array, block: int, valid: Array) -> Array:
    """Mean over the valid rows of each block: x [B, T, N, H], valid bool [B, T] -> float32 [B, N, blocks, H]."""
    pad = -x.shape[1] % block
    x = jnp.where(valid[:, :, None, None], x.astype(jnp.float32), 0.0)
    x, valid = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), jnp.pad(valid, ((0, 0), (0, pad)))
    sums = x.reshape(x.shape[0], -1, block, *x.shape[2:]).sum(axis=2)
    counts = valid.reshape(valid.shape[0], -1, block).sum(axis=2)
    return (sums / jnp.maximum(counts, 1)[:, :, None, None]).swapaxes(1, 2)


def block_sparse(
    q: Array,
    k: Array,
    *,
    num_blocks: Array,
    capacity: int,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    kernels: EstimateKernels = XLA,
) -> BlockSparseIndices:
    """Chooses the key blocks of every query tile and head by the product of mean queries and mean keys.

    The first block, whose sinks a mean key hides, and those that hold a tile's own positions are always among them.
    Means are over valid tokens only.

    Args:
      q: [B, T, N, H]. k: [B, S, K, H].
      num_blocks: int32 [N], blocks of ``tiles.block_kv`` keys per query tile, at most ``capacity``.
      capacity: static length of the lists.
      scale: multiplies the scores; its sign matters.
      q_offset: int32 [B], absolute position of the first query. kv_len: int32 [B], valid keys.
      tiles: tile sizes.
      kernels: what selects.

    Returns:
      BlockSparseIndices.

    Source: arXiv 2407.02490, algorithm 3; unlike microsoft/MInference the first and the diagonal block are always kept.
    """
    batch, q_len, num_heads, head_dim = q.shape
    starts = tile_starts(q_offset, q_len, tiles)
    position = q_offset[:, None] + jnp.arange(q_len, dtype=jnp.int32)
    q_means = _block_means(q, tiles.block_q, position < kv_len[:, None])
    k_means = _block_means(k, tiles.block_kv, jnp.arange(k.shape[1]) < kv_len[:, None])
    blocks = jnp.arange(k_means.shape[2], dtype=jnp.int32)

    def some_tiles(args):  # R query tiles of all heads: q [R, B, N, H], starts [R, B]
        q, starts = args
        grouped = q.reshape(*q.shape[:2], k_means.shape[1], -1, head_dim)
        scores = jnp.einsum("rbkgh,bksh->rbkgs", grouped, k_means, precision="highest")
        scores = scores.reshape(*q.shape[:3], -1) * scale
        first, end = (x[..., None, None] for x in (starts, jnp.minimum(starts + tiles.block_q, kv_len)))
        visible = blocks * tiles.block_kv < end
        forced = visible & ((blocks >= first // tiles.block_kv) | (blocks == 0))
        scores = jnp.where(visible, jnp.where(forced, jnp.inf, scores), -jnp.inf)
        wanted = jnp.minimum(jnp.maximum(num_blocks, forced.sum(axis=-1)), visible.sum(axis=-1)).astype(jnp.int32)
        kept = kernels.top_k_mask(scores, wanted)
        return compact(kept, capacity), kept.sum(axis=-1, dtype=jnp.int32)

    at_once = max(1, min(starts.shape[1], SCORES_AT_ONCE // (batch * num_heads * blocks.size)))
    steps = -(-starts.shape[1] // at_once)

    def stepwise(x):  # [Tq, ...] -> [steps, at_once, ...]
        x = jnp.pad(x, [(0, steps * at_once - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(steps, at_once, *x.shape[1:])

    ids, counts = lax.map(some_tiles, (stepwise(q_means.transpose(2, 0, 1, 3)), stepwise(starts.T)))
    ids, counts = (x.reshape(-1, *x.shape[2:])[: starts.shape[1]] for x in (ids, counts))
    return BlockSparseIndices(ids.transpose(1, 2, 0, 3), counts.transpose(1, 2, 0))

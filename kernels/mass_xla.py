"""Attention mass of a few queries per key and per distance, in pure JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def attention_mass(q: Array, k: Array, positions: Array, *, scale: float) -> tuple[Array, Array]:
    """Sums the attention weights of consecutive queries over each key and over each distance.

    Args:
      q: [B, L, N, H]. k: [B, S, K, H], same dtype, N a multiple of K.
      positions: int32 [B, L], where the queries stand, each one after the one before; -1 = no query: it sees no key.
      scale: multiplies the scores.

    Returns:
      float32 [B, N, S] for each key, and float32 [B, N, S] for each distance (query position minus key position).
      Scores and softmax are float32.

    Source: arXiv 2407.02490, section 3.2 and algorithm 2.
    """
    batch, size, num_kv_heads, head_dim = k.shape
    num_queries, num_heads = q.shape[1:3]
    keys = jnp.arange(size, dtype=jnp.int32)

    def group(args):  # one KV head of one sequence: q [L, G, H], k [S, H]
        q, k, positions = args
        scores = jnp.einsum("lgh,sh->gls", q, k, precision="highest", preferred_element_type=jnp.float32) * scale
        seen = keys <= positions[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
        weights = jnp.where(seen, weights, 0.0)
        # Shift row l left by l, so that diagonals stand in columns: column c holds key - l = c - (L - 1).
        width = size + 2 * num_queries
        skewed = jnp.pad(weights, ((0, 0), (0, 0), (num_queries - 1, num_queries + 1)))
        skewed = jnp.pad(skewed.reshape(-1, num_queries * width), ((0, 0), (0, num_queries)))
        diagonals = skewed.reshape(-1, num_queries, width + 1).sum(axis=1)
        column = positions[-1] - keys  # distance = positions[-1] - (L - 1) + l - key
        slashes = jnp.where(column >= 0, diagonals[:, jnp.maximum(column, 0)], 0.0)
        return weights.sum(axis=1), slashes

    rows = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch * num_kv_heads, num_queries, -1, head_dim)
    k = k.swapaxes(1, 2).reshape(batch * num_kv_heads, size, head_dim)
    verticals, slashes = lax.map(group, (rows, k, jnp.repeat(positions, num_kv_heads, axis=0)))
    return verticals.reshape(batch, num_heads, size), slashes.reshape(batch, num_heads, size)

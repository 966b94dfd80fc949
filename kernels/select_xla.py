"""The k largest of many numbers in pure JAX: nothing is sorted, and k may be traced."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def ordered_bits(scores: Array) -> Array:
    """Unsigned integers in the order of the floats: uint32 of float32, no NaN. Equal numbers give equal bits."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.uint32)  # + 0.0 makes -0.0 equal 0.0
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def top_k_mask(scores: Array, k: Array) -> Array:
    """Marks the k largest entries of the last axis; of equal ones the first.

    The threshold is found bit by bit on the order-preserving integer form of the floats.

    Args:
      scores: float32 [..., M], no NaN.
      k: int32 [...], between 0 and M.

    Returns:
      bool [..., M] with exactly k entries True in each row.
    """
    keys = ordered_bits(scores)

    def refine(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = (keys >= candidate[..., None]).sum(axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros(k.shape, jnp.uint32))[..., None]
    above, ties = keys > threshold, keys == threshold
    missing = k - above.sum(axis=-1, dtype=jnp.int32)
    return (above | (ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= missing[..., None]))) & (k > 0)[..., None]

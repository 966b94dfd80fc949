"""The oracle as an implementation of attention: exact, quadratic, and compiled in a fraction of the kernels' time."""

from __future__ import annotations

import jax.numpy as jnp

from minference_jax.implementations import Implementation
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import layout_mask
from minference_jax.kernels.tiles import xla_tiles


def oracle_implementation() -> Implementation:
    """Attention on exactly the pairs of a layout's mask, for inputs of hundreds of tokens; its name is "oracle"."""
    return Implementation("oracle", xla_tiles, _dense, _sparse)


def _dense(q, k, v, *, scale, q_offset, kv_len, tiles, skip_threshold=None):
    assert skip_threshold is None
    rows, keys = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (q, k))
    position = q_offset[:, None] + rows
    mask = (keys <= position[..., None]) & (keys < kv_len[:, None, None]) & (position < kv_len[:, None])[..., None]
    return reference.attention(q, k, v, mask[:, None], scale=scale)


def _sparse(q, k, v, layout, *, scale, q_offset, kv_len, tiles, skip_threshold=None):
    assert skip_threshold is None
    mask = layout_mask(layout, q_offset, kv_len, q.shape[1], k.shape[1], tiles)
    return reference.attention(q, k, v, mask, scale=scale)

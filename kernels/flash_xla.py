"""Dense causal attention in pure JAX, block by block: memory stays linear in the number of tokens."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from minference_jax.kernels import softmax
from minference_jax.kernels.tiles import TileConfig

ROWS = 384
"""Query rows per step, over the heads of a group: large enough for XLA's CPU dot to use every core."""
WIDTH = 1024
"""Keys per step."""

FEW_QUERIES = 4
"""Up to so many queries the scores are small and all keys go at once: decoding."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    skip_threshold: float | None = None,
) -> tuple[Array, Array]:
    """Causal attention of a query chunk over a cache.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. Any float dtype; the arithmetic is float32.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys; rows at positions >= kv_len are padding.
      tiles: not read: the steps here are larger.
      skip_threshold: as in ``minference_jax.attention``; a tile is one step: about ``ROWS`` rows of all heads of a
        group with ``WIDTH`` keys or more. Up to ``FEW_QUERIES`` queries take one step, which is never skipped.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; padding gives zeros and -inf.
    """
    q_len, num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[2]
    if q_len <= FEW_QUERIES:
        return _few_queries(q, k, v, scale, q_offset, kv_len)
    group_size = num_heads // num_kv_heads
    block_q = min(max(ROWS // group_size, 32), q_len)
    width = min(max(WIDTH, ROWS * WIDTH // (block_q * group_size)), 4 * WIDTH, k.shape[1])
    num_tiles = -(-q_len // block_q)
    rows = jnp.arange(block_q * group_size, dtype=jnp.int32) // group_size
    pad_q, pad_kv = num_tiles * block_q - q_len, -k.shape[1] % width

    def group(args):  # one KV head of one sequence with its query heads
        q, k, v, offset, length = args  # [T, G, H], [S, H], [S, H]
        q = jnp.pad(q, ((0, pad_q), (0, 0), (0, 0))).reshape(num_tiles, block_q * group_size, head_dim)
        k, v = (jnp.pad(x.astype(jnp.float32), ((0, pad_kv), (0, 0))) for x in (k, softmax.valid_rows(v, length)))

        def tile(args):
            index, q = args
            first = offset + index * block_q
            q = q.astype(jnp.float32) * scale
            # Rows of padding have no say in what is skipped.
            num_rows = block_q if skip_threshold is None else jnp.minimum(length, offset + q_len) - first

            def step(i, acc):
                at = i * width
                key = at + jnp.arange(width, dtype=jnp.int32)
                end = jnp.where(key < length, num_rows, 0)
                keys, values = (lax.dynamic_slice_in_dim(x, at, width) for x in (k, v))
                return softmax.update(acc, q, keys, values, rows, key - first, end, skip_threshold)

            reach = jnp.where(first < length, jnp.minimum(first + block_q, length), 0)
            acc = lax.fori_loop(0, (reach + width - 1) // width, step, softmax.start(rows.size, head_dim))
            out, lse = softmax.finish(acc)
            real = first + rows < length
            return jnp.where(real[:, None], out, 0.0), jnp.where(real, lse, -jnp.inf)

        out, lse = lax.map(tile, (jnp.arange(num_tiles, dtype=jnp.int32), q))
        out = out.reshape(num_tiles * block_q, group_size, head_dim)[:q_len]
        return out.astype(q.dtype), lse.reshape(num_tiles * block_q, group_size)[:q_len]

    def sequence(args):
        q, k, v, offset, length = args
        q = q.reshape(q_len, num_kv_heads, group_size, head_dim).swapaxes(0, 1)
        same = [jnp.broadcast_to(x, (num_kv_heads,)) for x in (offset, length)]
        out, lse = lax.map(group, (q, k.swapaxes(0, 1), v.swapaxes(0, 1), *same))
        return out.swapaxes(0, 1).reshape(q_len, num_heads, head_dim), lse.swapaxes(0, 1).reshape(q_len, num_heads)

    return lax.map(sequence, (q, k, v, q_offset, kv_len))


def _few_queries(q, k, v, scale, q_offset, kv_len) -> tuple[Array, Array]:
    batch, q_len, _, head_dim = q.shape
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    position = q_offset[:, None] + jnp.arange(q_len, dtype=jnp.int32)
    length = kv_len[:, None, None]
    seen = (key <= position[..., None]) & (key < length) & (position[..., None] < length)
    scores = product("btkgh,bskh->bkgts", q.reshape(batch, q_len, k.shape[2], -1, head_dim), k) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min / 2)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    v = jnp.where((key < kv_len[:, None])[..., None, None], v, 0)  # a weight of zero does not hide a NaN
    out = product("bkgts,bskh->btkgh", (weights / jnp.where(total != 0, total, 1.0)).astype(v.dtype), v)
    lse = jnp.where(total != 0, top + jnp.log(jnp.where(total != 0, total, 1.0)), -jnp.inf)[..., 0]
    return out.reshape(q.shape).astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(q.shape[:3])

"""What is stored of prompts with a plain tail behind it, and attention over both."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache.plain import KVCache, write_rows
from minference_jax.cache.policy import Block, Stored, layer_block, unpacked

_MOST_SLOTS = 16384  # that are read at a time
_MOST_SCORES = 1 << 21  # of a head, that exist at a time


class SplitCache(NamedTuple):
    """Prompts as a policy has stored them, which is only read, and the tokens after them.

    Attributes:
        prompt: a `Stored`.
        tail: later tokens, as they are; its `length` counts them alone.
    """

    prompt: Any
    tail: KVCache

    @property
    def length(self) -> jax.Array:
        """int32 [B], tokens of each row, prompt and tail."""
        return self.prompt.length + self.tail.length

    @property
    def capacity(self) -> int:
        """Slots of the prompt and of the tail."""
        return self.prompt.capacity + self.tail.capacity


class _Softmax(NamedTuple):
    """A softmax on its way, float32: the largest score and the sum [B, K, G, T], and the output [B, K, G, T, H]."""

    largest: jax.Array
    total: jax.Array
    out: jax.Array


def attend_split(
    q: jax.Array, prompt: Stored, tail: KVCache, layer: jax.Array, *, scale: float, count: jax.Array
) -> jax.Array:
    """Exact attention of new tokens over all that is stored of their prompts and causally over the tail.

    Slots are read in blocks and joined by an online softmax, so that nothing of the size of a layer is copied, and
    numbers with scales are never written out at full size: a key's scale is put on its scores.

    Args:
        q: queries [B, T, N, H].
        prompt: what is stored.
        tail: with the new tokens' keys and values written at `tail.length`, which does not count them yet.
        layer: int32 [], which to read.
        scale: what q·k is multiplied with.
        count: int32 [B], true number of new tokens.

    Returns:
        out [B, T, N, H] in q's dtype; rows beyond `count` mean nothing.
    """
    batch, rows, num_heads, head_dim = q.shape
    num_kv_heads = tail.k.shape[3]
    queries = q.reshape(batch, rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, rows)
    softmax = _Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    own = tail.length[:, None] + jnp.arange(rows)

    def tail_block(start: jax.Array, size: int) -> Block:
        return Block(*(layer_block(x, layer, start, size) for x in (tail.k, tail.v)))

    filled = prompt.filled(layer)
    parts: tuple[Any, ...] = (
        (partial(prompt.block, layer), prompt.capacity, filled, jnp.broadcast_to(filled[:, None], own.shape)),
        (tail_block, tail.capacity, tail.length + count, jnp.minimum(own + 1, (tail.length + count)[:, None])),
    )
    for read, slots, ends, seen in parts:
        softmax = _attend_part(softmax, queries, scale, read, slots, ends, seen)
    out = softmax.out / jnp.where(softmax.total == 0, 1.0, softmax.total)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)


def joined(prompt: Stored, tail: KVCache, layer: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S + C, K, H] of one layer in `dtype`, in the order of their tokens; for any attention.

    Args:
        prompt: what is stored, S slots, of a policy that keeps every token.
        tail: C slots, written behind the prompts' tokens.
        layer: int32 [], which to read.
        dtype: of the result, the tail's own.
    """

    def join(stored: jax.Array, later: jax.Array) -> jax.Array:
        room = [(0, 0), (0, tail.capacity), (0, 0), (0, 0)]
        behind = lax.dynamic_index_in_dim(later, layer, keepdims=False)
        return write_rows(jnp.pad(stored, room), behind, prompt.length)

    k, v = unpacked(prompt.block(layer, 0, prompt.capacity), dtype)
    return join(k, tail.k), join(v, tail.v)


def _attend_part(
    softmax: _Softmax, q: jax.Array, scale: float, read: Any, slots: int, ends: jax.Array, seen: jax.Array
) -> _Softmax:
    """Goes through the slots below the largest of `ends` [B]; row t of b sees those below seen[b, t]."""
    size = min(slots, _MOST_SLOTS, max(128, _MOST_SCORES // q.shape[1]))

    def step(index: jax.Array, softmax: _Softmax) -> _Softmax:
        start = jnp.minimum(index * size, slots - size)  # the last block may begin in the one before
        slot = start + jnp.arange(size)
        is_new = (slot >= index * size) & (slot < ends[:, None])
        is_seen = is_new[:, None] & (slot < seen[..., None])
        return _update(softmax, q, scale, read(start, size), is_new, is_seen)

    return lax.fori_loop(0, (jnp.max(ends) + size - 1) // size, step, softmax)


def _update(
    softmax: _Softmax, q: jax.Array, scale: float, block: Block, is_new: jax.Array, is_seen: jax.Array
) -> _Softmax:
    """One block more: q [B, T, K, G, H]; is_new [B, s], is_seen [B, T, s]."""
    dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 else jnp.float32
    product = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    scores = product("btkgh,bskh->bkgts", q.astype(dtype), block.k.astype(dtype)) * scale
    if block.k_scale is not None:
        scores = scores * jnp.moveaxis(block.k_scale, 1, 2)[:, :, None, None]
    scores = jnp.where(is_seen[:, None, None], scores, -jnp.inf)
    largest = jnp.maximum(softmax.largest, scores.max(-1))
    finite = jnp.where(jnp.isneginf(largest), 0.0, largest)
    shares, kept = jnp.exp(scores - finite[..., None]), jnp.exp(softmax.largest - finite)
    weights = shares
    if block.v_scale is not None:
        weights = shares * jnp.where(is_new[:, None], jnp.moveaxis(block.v_scale, 1, 2), 0)[:, :, None, None]
    values = jnp.where(is_new[..., None, None], block.v.astype(dtype), 0)
    out = softmax.out * kept[..., None] + product("bkgts,bskh->bkgth", weights.astype(dtype), values)
    return _Softmax(largest, softmax.total * kept + shares.sum(-1), out)

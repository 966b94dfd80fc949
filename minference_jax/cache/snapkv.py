"""SnapKV: the tokens that the last queries of a prompt look at most, and its last tokens.

Source: arXiv 2404.14469; here the scores of the query heads of a group are averaged, so that each KV head keeps
one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache.kept import Kept, KeptKV, check_sizes, keep_positions


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """A policy: every KV head keeps `capacity` tokens of a prompt; a prompt that is no longer is kept whole.

    Attributes:
        capacity: tokens that a KV head keeps, the window among them.
        window_size: last tokens of the prompt: they are kept, and their queries choose the others.
        pool_size: tokens over which scores are averaged, an odd number, so that neighbours are kept together.

    Raises:
        ValueError: a size below 1, a window that leaves no room, an even pool_size.
    """

    capacity: int = 4096
    window_size: int = 32
    pool_size: int = 5
    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        check_sizes(capacity=self.capacity, window_size=self.window_size, pool_size=self.pool_size)
        if self.window_size >= self.capacity or self.pool_size % 2 == 0:
            raise ValueError(
                f"window_size={self.window_size} must be below capacity={self.capacity}, "
                f"and pool_size={self.pool_size} odd"
            )

    def keep(self, q, k, v, *, lengths, layer, num_layers, scale) -> Kept:
        """As in `CachePolicy`."""
        counts = jnp.minimum(lengths, self.capacity)
        scores = window_scores(q, k, lengths, self.window_size, self.pool_size, scale)
        return keep_positions(k, v, best_positions(scores, min(k.shape[1], self.capacity), counts), counts)

    def stored(self, kept: Kept, length: jax.Array) -> KeptKV:
        """As in `CachePolicy`."""
        return KeptKV(*kept, length)


def window_scores(
    q: jax.Array, k: jax.Array, lengths: jax.Array, window_size: int, pool_size: int, scale: float
) -> jax.Array:
    """How much the last queries look at each token, float32 [B, K, T]: infinite in the window, -infinite in padding.

    Softmax of the window's queries over all keys that they see, summed over the queries, pooled over the tokens before
    the window, averaged over the query heads of a group. One KV head at a time: the scores are as long as the prompt.

    Args:
        q, k: queries [B, T, N, H] and keys [B, T, K, H] of whole prompts.
        lengths: int32 [B], true lengths.
        window_size, pool_size: in tokens.
        scale: what q·k is multiplied with.
    """
    batch, count, num_kv_heads, head_dim = k.shape
    rows = lengths[:, None] - window_size + jnp.arange(window_size)
    last = jnp.take_along_axis(q, jnp.maximum(rows, 0)[..., None, None], axis=1)
    last = last.reshape(batch, window_size, num_kv_heads, -1, head_dim)
    token = jnp.arange(count)
    is_before = token < (lengths - window_size)[:, None]
    is_seen = (token <= rows[..., None])[:, None]  # none by rows before the start

    def of_head(head: jax.Array) -> jax.Array:
        queries, keys = (lax.dynamic_index_in_dim(x, head, 2, keepdims=False) for x in (last, k))
        product = jnp.einsum("bwgh,bth->bgwt", queries, keys, precision="highest", preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(jnp.where(is_seen, product * scale, -jnp.inf), axis=-1)
        mass = jnp.where(is_before, jnp.where(is_seen, shares, 0).sum(2).mean(1), 0.0)
        half = pool_size // 2
        return lax.reduce_window(mass, 0.0, lax.add, (1, pool_size), (1, 1), ((0, 0), (half, half))) / pool_size

    pooled = lax.map(of_head, jnp.arange(num_kv_heads, dtype=jnp.int32)).swapaxes(0, 1)
    outside = jnp.where(token < lengths[:, None], jnp.inf, -jnp.inf)
    return jnp.where(is_before[:, None], pooled, outside[:, None])


def best_positions(scores: jax.Array, slots: int, counts: jax.Array) -> jax.Array:
    """The positions of the highest scores, ascending, int32 [B, slots, K]; T where there are fewer.

    Args:
        scores: float32 [B, K, T].
        slots: at most T.
        counts: int32 [B], how many to take.
    """
    _, positions = lax.top_k(scores, slots)
    taken = jnp.arange(slots) < counts[:, None, None]
    return jnp.sort(jnp.where(taken, positions.astype(jnp.int32), scores.shape[2]), axis=-1).swapaxes(1, 2)

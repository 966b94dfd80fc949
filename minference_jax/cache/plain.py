"""The plain cache: keys and values as the model made them, handed from call to call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache.policy import Block, layer_block


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far, of all layers.

    Attributes:
        k: keys [L, B, S, K, H]: layers, batch, capacity in tokens, KV heads, head_dim.
        v: values [L, B, S, K, H].
        length: int32 [B], tokens written in each row; what lies at or beyond it is padding.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, the number of tokens a row can hold."""
        return self.k.shape[2]

    @property
    def kind(self) -> str:
        """As in `Stored`."""
        return "plain"

    def filled(self, layer: jax.Array) -> jax.Array:
        """As in `Stored`: every layer holds every token."""
        return self.length

    def block(self, layer: jax.Array, start: jax.Array | int, size: int) -> Block:
        """As in `Stored`."""
        return Block(*(layer_block(x, layer, start, size) for x in (self.k, self.v)))

    def append(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[KVCache, jax.Array, jax.Array]:
        """As in `Growing`."""
        keys, values = (write_layer(x, new, layer, self.length) for x, new in ((self.k, k), (self.v, v)))
        of_layer = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
        return self._replace(k=keys, v=values), *of_layer


@dataclass(frozen=True)
class Plain:
    """A policy: everything is kept, in the model's dtype."""

    name: ClassVar[str] = "plain"

    def keep(self, q, k, v, *, lengths, layer, num_layers, scale) -> tuple[jax.Array, jax.Array]:
        """As in `CachePolicy`."""
        return k, v

    def stored(self, kept: tuple[jax.Array, jax.Array], length: jax.Array) -> KVCache:
        """As in `CachePolicy`."""
        return KVCache(*kept, length)

    def empty(
        self, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> KVCache:
        """`init_cache`."""
        return init_cache(num_layers, batch, capacity, num_kv_heads, head_dim, dtype)


def init_cache(
    num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """An empty cache of zeros.

    Args:
        num_layers, batch, capacity, num_kv_heads, head_dim: L, B, S (tokens), K and H of the arrays, each at least 1.
        dtype: of the keys and values; the model's own.

    Raises:
        ValueError: a size is below 1.
    """
    dimensions = (num_layers, batch, capacity, num_kv_heads, head_dim)
    if min(dimensions) < 1:
        raise ValueError(
            f"{num_layers=}, {batch=}, {capacity=}, {num_kv_heads=} and {head_dim=} must each be at least 1"
        )
    return KVCache(jnp.zeros(dimensions, dtype), jnp.zeros(dimensions, dtype), jnp.zeros((batch,), jnp.int32))


def extend_cache(cache: KVCache, capacity: int) -> KVCache:
    """A copy of `cache` with room for `capacity` tokens a row; the original stays valid.

    Raises:
        ValueError: `capacity` is below that of `cache`.
    """
    if capacity < cache.capacity:
        raise ValueError(f"{capacity=} must be at least the {cache.capacity} tokens that the cache holds already")
    return _extended(cache, capacity)


@partial(jax.jit, static_argnames="capacity")
def _extended(cache: KVCache, capacity: int) -> KVCache:
    padding = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0), (0, 0)]
    return KVCache(jnp.pad(cache.k, padding), jnp.pad(cache.v, padding), jnp.copy(cache.length))


def write_rows(held: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """As `write_layer`, of a single layer's keys or values [B, S, K, H]."""
    return write_layer(held[None], new, jnp.int32(0), start)[0]


def write_layer(stacked: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """`stacked` with the rows `new` of one layer written from `start` on; in place where the buffer allows it.

    One window per batch row, so that a step of decoding touches one token per row and not the whole cache.

    Args:
        stacked: the keys or the values of a cache [L, B, S, K, H], or their scales [L, B, S, K].
        new: rows to write [B, T, K, H] or [B, T, K], in the cache's dtype.
        layer: int32 scalar.
        start: int32 [B], the position of the first row; `start + T` must not exceed S, a row that does is not written.
    """
    batch = new.shape[0]
    indices = jnp.stack([jnp.full((batch,), layer, jnp.int32), jnp.arange(batch, dtype=jnp.int32), start], axis=-1)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, new.ndim)),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    return lax.scatter(
        stacked,
        indices,
        new,
        dimensions,
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )

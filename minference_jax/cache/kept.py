"""What the compressing policies share: some tokens of a prompt, of each KV head its own."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache.policy import Block, layer_block


class KeptKV(NamedTuple):
    """Keys and values of the tokens kept, in the order of their positions; keys are turned for those positions.

    Attributes:
        k, v: [L, B, C, K, H], C slots.
        positions: int32 [L, B, C, K], of the prompt's tokens; slots without one mean nothing.
        counts: int32 [L, B], slots that hold a token.
        length: int32 [B], tokens of each prompt, kept or not.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    counts: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """C, slots of a row: of the layer that keeps most."""
        return self.k.shape[2]

    @property
    def kind(self) -> str:
        """As in `Stored`; of whatever policy, it is read alike."""
        return "kept"

    def filled(self, layer: jax.Array) -> jax.Array:
        """As in `Stored`."""
        return lax.dynamic_index_in_dim(self.counts, layer, keepdims=False)

    def block(self, layer: jax.Array, start: jax.Array | int, size: int) -> Block:
        """As in `Stored`."""
        return Block(*(layer_block(x, layer, start, size) for x in (self.k, self.v)))


Kept: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""k, v, positions and counts of one layer."""


def keep_positions(k: jax.Array, v: jax.Array, positions: jax.Array, counts: jax.Array) -> Kept:
    """What a layer's `keep` gives: the rows at some positions, what a `KeptKV` has of a layer.

    Args:
        k, v: [B, T, K, H].
        positions: int32 [B, C, K], the first of them ascending, in any case at most T; T stands for none.
        counts: int32 [B], how many are positions of tokens.
    """
    rows = jnp.minimum(positions, k.shape[1] - 1)[..., None]
    is_kept = (jnp.arange(positions.shape[1]) < counts[:, None])[..., None, None]
    k, v = (jnp.where(is_kept, jnp.take_along_axis(x, rows, axis=1), 0) for x in (k, v))
    return k, v, positions, counts


def empty_kept(
    num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> KeptKV:
    """Zeros with `capacity` slots a row; other arguments as of `init_cache`."""
    slots = (num_layers, batch, capacity, num_kv_heads)
    k, v = (jnp.zeros((*slots, head_dim), dtype) for _ in range(2))
    counts = jnp.zeros((num_layers, batch), jnp.int32)
    return KeptKV(k, v, jnp.zeros(slots, jnp.int32), counts, jnp.zeros((batch,), jnp.int32))


def check_sizes(**sizes: int) -> None:
    """Refuses, with ValueError, sizes that are no positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1")

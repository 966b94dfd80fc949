"""What every cache policy answers to: what it keeps of a layer's prompt, and how that is read again.

A policy is static and hashable; what it has stored is a pytree of arrays. Decoding only reads what was stored of the
prompt: later tokens go to a plain tail of their own (`SplitCache`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Block(NamedTuple):
    """Some slots of one layer.

    Attributes:
        k, v: [B, s, K, H], in any dtype.
        k_scale, v_scale: float32 [B, s, K], what those of each token and head are multiplied with; None = 1.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class Stored(Protocol):
    """Keys and values of prompts, of all layers, in slots; a pytree of arrays."""

    @property
    def length(self) -> jax.Array:
        """int32 [B], tokens of each prompt, kept or not: the position of the next token."""

    @property
    def capacity(self) -> int:
        """Slots of a row."""

    @property
    def kind(self) -> str:
        """How a file calls it."""

    def filled(self, layer: jax.Array) -> jax.Array:
        """int32 [B], how many slots of a layer, from the first on, hold a token."""

    def block(self, layer: jax.Array, start: jax.Array | int, size: int) -> Block:
        """The slots from `start` on; `start + size` must not exceed `capacity`."""


class Growing(Stored, Protocol):
    """What more tokens of the prompts can be read into: it holds every token, slot s that of token s."""

    def append(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Growing, jax.Array, jax.Array]:
        """Writes new tokens of one layer behind `length`, which does not count them yet.

        Args:
            layer: int32 [].
            k, v: [B, T, K, H] in the model's dtype; `length + T` must not exceed `capacity`, a row that does is not
                written.

        Returns:
            It with the new tokens, and what they attend to: keys and values [B, S, K, H] of the layer in the model's
            dtype, those before as they are stored and the new ones as they are.
        """


class CachePolicy(Protocol):
    """What is kept of a prompt's keys and values; static and hashable."""

    @property
    def name(self) -> str:
        """How the command line calls it."""

    def keep(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        lengths: jax.Array,
        layer: jax.Array,
        num_layers: int,
        scale: float,
    ) -> Any:
        """What is kept of one layer, a pytree of arrays of the same shapes for every layer.

        Args:
            q: queries [B, T, N, H] of whole prompts.
            k, v: keys and values [B, T, K, H], the layer's own.
            lengths: int32 [B], true lengths.
            layer: int32 [], which it is.
            num_layers: how many there are.
            scale: what q·k is multiplied with.
        """

    def stored(self, kept: Any, length: jax.Array) -> Any:
        """A `Stored` of what `keep` gave, stacked over the layers [L, ...], and the prompts' lengths int32 [B]."""


def unpacked(block: Block, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, s, K, H] of a block in `dtype`, scales multiplied in."""

    def scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
        return x.astype(dtype) if scale is None else (x.astype(jnp.float32) * scale[..., None]).astype(dtype)

    return scaled(block.k, block.k_scale), scaled(block.v, block.v_scale)


def layer_block(stacked: jax.Array, layer: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """[B, size, ...] of one layer's slots from `start` on, out of an array [L, B, S, ...]; nothing else is copied.

    Heads and their numbers are one axis while the block is cut out, and the compiler may not look through that: it
    would otherwise turn the whole array into the order that a product of single heads likes best, before the loop.
    """
    flat = stacked.reshape(*stacked.shape[:3], -1)
    found = lax.dynamic_slice(flat, (layer, 0, start, 0), (1, flat.shape[1], size, flat.shape[3]))
    return lax.optimization_barrier(found).reshape(flat.shape[1], size, *stacked.shape[3:])

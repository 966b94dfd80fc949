"""The quantised cache: int8 or float8_e4m3fn, with a scale for each token and KV head.

float8 is held as its bits: where a device has no such numbers, XLA would widen a whole array to move some of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache.plain import KVCache, write_layer, write_rows
from minference_jax.cache.policy import Block, layer_block, unpacked

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_HELD = {"int8": jnp.int8, "float8_e4m3fn": jnp.uint8}


class QuantisedKV(NamedTuple):
    """Keys and values as small numbers times a scale.

    Attributes:
        k, v: [L, B, S, K, H], int8, or uint8: the bits of float8_e4m3fn.
        k_scale, v_scale: float32 [L, B, S, K].
        length: int32 [B], tokens of each prompt.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, slots of a row."""
        return self.k.shape[2]

    @property
    def kind(self) -> str:
        """As in `Stored`."""
        return "int8" if self.k.dtype == jnp.int8 else "fp8"

    def check(self) -> None:
        """Refuses, with ValueError, arrays that are not of the dtypes and shapes above."""
        if self.k.dtype not in (jnp.int8, jnp.uint8) or self.v.dtype != self.k.dtype:
            raise ValueError(f"cache.k and cache.v must both be int8 or uint8, got {self.k.dtype} and {self.v.dtype}")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale.shape != self.k.shape[:-1] or scale.dtype != jnp.float32:
                needed = f"float32{list(self.k.shape[:-1])}"
                raise ValueError(f"cache.{name} must be {needed}, got {scale.dtype}{list(scale.shape)}")

    def filled(self, layer: jax.Array) -> jax.Array:
        """As in `Stored`: every layer holds every token."""
        return self.length

    def block(self, layer: jax.Array, start: jax.Array | int, size: int) -> Block:
        """As in `Stored`."""
        k, v, k_scale, v_scale = (layer_block(x, layer, start, size) for x in self[:4])
        return Block(_numbers(k), _numbers(v), k_scale, v_scale)

    def append(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> tuple[QuantisedKV, jax.Array, jax.Array]:
        """As in `Growing`; one layer is written out in the model's dtype."""
        dtype = "int8" if self.kind == "int8" else "float8_e4m3fn"
        (small_k, k_scale), (small_v, v_scale) = (quantise(x, dtype) for x in (k, v))

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            return write_layer(held, new, layer, self.length)

        scales = write(self.k_scale, k_scale), write(self.v_scale, v_scale)
        cache = QuantisedKV(write(self.k, small_k), write(self.v, small_v), *scales, self.length)
        all_k, all_v = unpacked(cache.block(layer, 0, self.capacity), k.dtype)
        return cache, write_rows(all_k, k, self.length), write_rows(all_v, v, self.length)


@dataclass(frozen=True)
class Quantised:
    """A policy: the prompt is read with exact keys and values, and kept as small numbers.

    Attributes:
        dtype: "int8" or "float8_e4m3fn".

    Raises:
        ValueError: another dtype.
    """

    dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.dtype not in _LARGEST:
            raise ValueError(f"dtype={self.dtype!r} of a quantised cache must be one of {', '.join(_LARGEST)}")

    @property
    def name(self) -> str:
        """How the command line calls it."""
        return "int8" if self.dtype == "int8" else "fp8"

    def keep(self, q, k, v, *, lengths, layer, num_layers, scale) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """As in `CachePolicy`."""
        (k, k_scale), (v, v_scale) = quantise(k, self.dtype), quantise(v, self.dtype)
        return k, v, k_scale, v_scale

    def stored(self, kept: tuple[jax.Array, jax.Array, jax.Array, jax.Array], length: jax.Array) -> QuantisedKV:
        """As in `CachePolicy`."""
        return QuantisedKV(*kept, length)

    def empty(
        self, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> QuantisedKV:
        """Zeros with room for `capacity` tokens a row; arguments as of `init_cache`, `dtype` is the policy's own."""
        scales = (num_layers, batch, capacity, num_kv_heads)
        k, v = (jnp.zeros((*scales, head_dim), _HELD[self.dtype]) for _ in range(2))
        return QuantisedKV(k, v, jnp.zeros(scales), jnp.zeros(scales), jnp.zeros((batch,), jnp.int32))


def quantise(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Vectors [..., H] as numbers of `dtype` [..., H], as they are held, and scales float32 [...] by which their
    largest is the dtype's.

    int8 is off by at most half a scale, float8_e4m3fn by at most 1/16 of a number's size or 2^-10 of a scale. A vector
    with a NaN or an infinity has a scale that is none, too.

    Args:
        x: of any float dtype.
        dtype: "int8" or "float8_e4m3fn".
    """
    exact = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(exact), axis=-1) / _LARGEST[dtype]
    numbers = exact / jnp.where(scale == 0, 1.0, scale)[..., None]
    numbers = jnp.round(numbers) if dtype == "int8" else numbers
    return lax.bitcast_convert_type(numbers.astype(dtype), _HELD[dtype]), scale


def _numbers(held: jax.Array) -> jax.Array:
    """What arrays as they are held stand for; nothing is computed."""
    return held if held.dtype == jnp.int8 else lax.bitcast_convert_type(held, jnp.float8_e4m3fn)


class QuantisationError(NamedTuple):
    """How far a quantised cache is from the exact one, over the prompts' tokens.

    Attributes:
        k, v: float32 [L], root of the mean square of the differences by that of the exact values.
        k_largest, v_largest: float32 [L], the largest difference.
    """

    k: jax.Array
    v: jax.Array
    k_largest: jax.Array
    v_largest: jax.Array


@jax.jit
def quantisation_error(quantised: QuantisedKV, exact: KVCache) -> QuantisationError:
    """What quantising has changed, layer by layer.

    Args:
        quantised: of a prefill with `Quantised`.
        exact: of the same prefill with the plain cache.

    Raises:
        ValueError: they are not of the same shape.
    """
    if quantised.k.shape != exact.k.shape:
        shapes = list(quantised.k.shape), list(exact.k.shape)
        raise ValueError(f"the quantised keys are {shapes[0]} and the exact ones {shapes[1]}: not of one prefill")
    is_token = jnp.arange(exact.capacity) < exact.length[:, None]

    def of_layer(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        held, scale, array = arrays
        array = jnp.where(is_token[..., None, None], array.astype(jnp.float32), 0)
        difference = (
            jnp.where(is_token[..., None, None], _numbers(held).astype(jnp.float32) * scale[..., None], 0) - array
        )
        relative = jnp.sqrt(jnp.sum(difference**2) / jnp.maximum(jnp.sum(array**2), jnp.finfo(jnp.float32).tiny))
        return relative, jnp.max(jnp.abs(difference))

    k, k_largest = jax.lax.map(of_layer, (quantised.k, quantised.k_scale, exact.k))
    v, v_largest = jax.lax.map(of_layer, (quantised.v, quantised.v_scale, exact.v))
    return QuantisationError(k, v, k_largest, v_largest)

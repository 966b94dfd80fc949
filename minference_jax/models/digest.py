"""A digest of a model's weights, by which a run that goes on tells other weights apart."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from flax import nnx

from minference_jax.models.parameters import parameters_of

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def weights_digest(model: nnx.Module) -> str:
    """16 hexadecimal digits that depend on the name, shape, dtype and every bit of every parameter.

    It is integer arithmetic modulo 2^32 where the weights are, so that any device and any split over a mesh gives the
    same; one number for each parameter comes to the host. The weights are read once, layer by layer.

    Args:
        model: with its parameters, of 1, 2 or 4 bytes an element.
    """
    hashes = {name: (array, _hash(array)) for name, array in parameters_of(model).items()}
    digest = hashlib.sha256()
    for name, (array, value) in sorted(hashes.items()):
        digest.update(f"{name} {array.shape} {array.dtype} {int(value)}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _hash(array: jax.Array) -> jax.Array:
    """uint32 [] of an array's bits and their places, of a stacked one a layer at a time: where sums are not fused the
    integers are held."""
    if array.ndim < 3:
        return _folded(array)
    return _folded(jax.lax.map(lambda layer: _folded(jax.lax.optimization_barrier(layer)), array))


def _folded(array: jax.Array) -> jax.Array:
    """uint32 []: axis after axis, from the last, is summed with odd weights; what comes out is mixed."""
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    for length in reversed(array.shape):
        weights = jax.lax.iota(jnp.uint32, length) * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
        bits = _mixed(jnp.sum(bits * weights, axis=-1, dtype=jnp.uint32))
    return bits


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits of which every bit depends on every other: MurmurHash3's last step."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

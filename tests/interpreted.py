"""The Triton kernels in Pallas' interpreter, as an implementation of its own: for machines without a GPU."""

import functools

from minference_jax.estimate import EstimateKernels
from minference_jax.implementations import Implementation
from minference_jax.kernels import mass_triton, select_triton, sparse_triton
from minference_jax.kernels.tiles import TileConfig


def interpreted_triton(tiles=TileConfig()):  # noqa: B008
    """Triton kernels that run on any device, whatever it is, with the given tiles."""
    kernels = (sparse_triton.dense, sparse_triton.attention, mass_triton.attention_mass, select_triton.top_k_mask)
    dense, sparse, mass, top_k = (functools.partial(kernel, interpret=True) for kernel in kernels)
    return Implementation("triton interpreted", lambda *args: tiles, dense, sparse, EstimateKernels(mass, top_k))

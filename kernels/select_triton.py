"""The k largest of many numbers as one Pallas kernel, lowered through Triton: rows of any length, nothing is sorted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from minference_jax.kernels.select_xla import ordered_bits

_WIDTH = 4096  # entries per step
_NUM_WARPS = 16


def top_k_mask(scores: Array, k: Array, *, interpret: bool = False) -> Array:
    """Marks the k largest entries of the last axis; of equal ones the first.

    Args:
      scores: float32 [..., M], no NaN.
      k: int32 [...], between 0 and M.
      interpret: run in Pallas' interpreter, for tests.

    Returns:
      bool [..., M] with exactly k entries True in each row.
    """
    size = scores.shape[-1]
    bits, count = ordered_bits(scores).reshape(-1, size), k.reshape(-1, 1)
    width = min(_WIDTH, pl.next_power_of_2(size))
    row = pl.BlockSpec((None, size), lambda i: (i, 0))
    mask = pl.pallas_call(
        functools.partial(_top_k_kernel, width=width),
        grid=(bits.shape[0],),
        in_specs=[row, pl.BlockSpec((None, 1), lambda i: (i, 0))],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(bits.shape, jnp.int8),
        compiler_params=pltriton.CompilerParams(num_warps=max(1, min(_NUM_WARPS, width // 256)), num_stages=2),
        interpret=interpret,
        name="top_k_mask",
    )(bits, count)
    return mask.reshape(scores.shape) > 0


def _top_k_kernel(bits_ref, k_ref, mask_ref, *, width: int):
    """One row: the threshold two bits at a time from the top, then the mask from the first entry on."""
    size, k = bits_ref.shape[0], k_ref[0]
    steps = (size + width - 1) // width

    def load(i):  # behind the end 0, which is below every candidate
        at = i * width + jnp.arange(width)
        return pltriton.load(bits_ref.at[pl.ds(i * width, width)], mask=at < size, other=0)

    def count(candidates):  # entries that are not below each candidate
        def step(i, counts):
            bits = load(i)
            return tuple(n + (bits >= c).astype(jnp.int32) for n, c in zip(counts, candidates, strict=True))

        counts = lax.fori_loop(0, steps, step, (jnp.zeros((width,), jnp.int32),) * len(candidates))
        return [jnp.sum(n) for n in counts]

    def refine(i, threshold):
        shift = (30 - 2 * i).astype(jnp.uint32)
        candidates = [threshold | (jnp.uint32(digit) << shift) for digit in (1, 2, 3)]
        for candidate, enough in zip(candidates, count(candidates), strict=True):
            threshold = jnp.where(enough >= k, candidate, threshold)
        return threshold

    threshold = lax.fori_loop(0, 16, refine, jnp.uint32(0))
    (not_above,) = count([threshold + jnp.uint32(1)])
    missing = k - jnp.where(threshold == jnp.uint32(0xFFFFFFFF), 0, not_above)

    def mark(i, ties_before):
        bits = load(i)
        ties = (bits == threshold).astype(jnp.int32)
        rank = ties_before + jnp.cumsum(ties)
        keep = (bits > threshold) | ((ties > 0) & (rank <= missing))
        at = i * width + jnp.arange(width)
        pltriton.store(mask_ref.at[pl.ds(i * width, width)], (keep & (k > 0)).astype(jnp.int8), mask=at < size)
        return ties_before + jnp.sum(ties)

    lax.fori_loop(0, steps, mark, jnp.int32(0))

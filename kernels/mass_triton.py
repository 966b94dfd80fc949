"""Attention mass of a few queries per key and per distance: two Pallas kernels, lowered through Triton.

The first writes the scores and the softmax statistics of stretches of keys; the second sums the weights along columns
and along diagonals, both in one order whatever the device does, so that two runs choose the same keys.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from minference_jax.kernels.sparse_triton import dot, head_parts

SCORE_BYTES = 1 << 30
"""Most memory for scores at a time; with more, groups of KV heads go one after another."""
_STRETCH = 1024  # keys per program of the first kernel
_WIDTH = {2: 128, 4: 16}  # keys per step of it, by bytes of an element
_SUM_WIDTH = 512  # keys, and distances, per program of the second kernel


def attention_mass(
    q: Array, k: Array, positions: Array, *, scale: float, interpret: bool = False
) -> tuple[Array, Array]:
    """Sums the attention weights of consecutive queries over each key and over each distance.

    Args:
      q: [B, L, N, H], L a power of two. k: [B, S, K, H], same dtype, N a multiple of K. Where H is no
        multiple of 16, padded copies are taken.
      positions: int32 [B, L], where the queries stand, each one after the one before; -1 = no query: it sees no key.
      scale: multiplies the scores.
      interpret: run in Pallas' interpreter, for tests.

    Returns:
      float32 [B, N, S] for each key, and float32 [B, N, S] for each distance (query position minus key position).
      Scores and softmax are float32.

    Source: arXiv 2407.02490, section 3.2 and algorithm 2.
    """
    q, k = (jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[3] % 16)]) for x in (q, k))
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    rows = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    per_kv_head = batch * num_queries * (num_heads // num_kv_heads) * k.shape[1] * 4
    fits = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n * per_kv_head <= SCORE_BYTES]
    at_once = max(fits, default=1)

    def some_heads(first):
        ours, keys = (lax.dynamic_slice_in_dim(x, first, at_once, axis=2) for x in (rows, k))
        ours = ours.reshape(batch, num_queries, -1, head_dim)
        return _sums(*_scores(ours, keys, positions, scale, interpret), positions, interpret)

    if at_once == num_kv_heads:
        return some_heads(0)
    groups = lax.map(some_heads, jnp.arange(0, num_kv_heads, at_once))  # [groups, B, heads, S]
    verticals, slashes = (x.swapaxes(0, 1).reshape(batch, num_heads, -1) for x in groups)
    return verticals, slashes


def _scores(q: Array, k: Array, positions: Array, scale: float, interpret: bool) -> tuple[Array, Array]:
    """Scores in units of log 2, float32 [B, N, L, S], and their log-sum-exp, float32 [B, N, L]; inf for no query."""
    batch, num_queries, num_heads, head_dim = q.shape
    size, num_kv_heads = k.shape[1:3]
    group_size, num_stretches = num_heads // num_kv_heads, -(-size // _STRETCH)
    statistics = jax.ShapeDtypeStruct((batch, num_heads, num_stretches, num_queries), jnp.float32)
    statistics_spec = pl.BlockSpec((None, None, None, num_queries), lambda i, h, b: (b, h, i, 0))
    scores, top, total = pl.pallas_call(
        functools.partial(_scores_kernel, scale=scale),
        grid=(num_stretches, num_heads, batch),
        in_specs=[
            pl.BlockSpec((None, num_queries, None, head_dim), lambda i, h, b: (b, 0, h, 0)),
            pl.BlockSpec((None, size, None, head_dim), lambda i, h, b: (b, 0, h // group_size, 0)),
            pl.BlockSpec((None, num_queries), lambda i, h, b: (b, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, num_queries, size), lambda i, h, b: (b, h, 0, 0)),
            statistics_spec,
            statistics_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, num_queries, size), jnp.float32),
            statistics,
            statistics,
        ],
        compiler_params=pltriton.CompilerParams(num_warps=2 * k.dtype.itemsize, num_stages=2),
        interpret=interpret,
        name="last_query_scores",
    )(q, k, positions)
    best = top.max(axis=2)
    total = (total * jnp.exp2(top - best[:, :, None])).sum(axis=2)
    return scores, jnp.where(total > 0, best + jnp.log2(total), jnp.inf)


def _scores_kernel(q_ref, k_ref, positions_ref, scores_ref, top_ref, total_ref, *, scale: float):
    """One stretch of keys of one head."""
    num_queries, size = scores_ref.shape
    parts = head_parts(q_ref.shape[1])
    width = _WIDTH[k_ref.dtype.itemsize]
    q = [q_ref[:, part] for part in parts]
    position = positions_ref[...]
    first = pl.program_id(0) * _STRETCH

    def step(i, statistics):
        top, total = statistics
        at = first + i * width
        key = at + jnp.arange(width)
        load = functools.partial(pltriton.load, mask=(key < size)[:, None], other=0.0)
        k = [load(k_ref.at[pl.ds(at, width), part]) for part in parts]
        scores = sum(dot(rows, part.T) for rows, part in zip(q, k, strict=True)) * (scale * math.log2(math.e))
        scores = jnp.where((key <= position[:, None]) & (key < size), scores, -jnp.inf)
        pltriton.store(scores_ref.at[:, pl.ds(at, width)], scores, mask=jnp.broadcast_to(key < size, scores.shape))
        best = jnp.maximum(top, jnp.max(scores, axis=1))
        return best, total * jnp.exp2(top - best) + jnp.sum(jnp.exp2(scores - best[:, None]), axis=1)

    start = jnp.full((num_queries,), jnp.finfo(jnp.float32).min / 2), jnp.zeros((num_queries,), jnp.float32)
    steps = jnp.minimum(_STRETCH // width, (size - first + width - 1) // width)
    top_ref[...], total_ref[...] = lax.fori_loop(0, steps, step, start)


def _sums(scores: Array, lse: Array, positions: Array, interpret: bool) -> tuple[Array, Array]:
    """Weights summed over the queries of each key, and of each distance: both float32 [B, N, S]."""
    batch, num_heads, num_queries, size = scores.shape
    sums = pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, 0))
    return pl.pallas_call(
        _sums_kernel,
        grid=(-(-size // _SUM_WIDTH), num_heads, batch),
        in_specs=[
            pl.BlockSpec((None, None, num_queries, size), lambda i, h, b: (b, h, 0, 0)),
            pl.BlockSpec((None, None, num_queries), lambda i, h, b: (b, h, 0)),
            pl.BlockSpec((None, num_queries), lambda i, h, b: (b, 0)),
        ],
        out_specs=[sums, sums],
        out_shape=[jax.ShapeDtypeStruct((batch, num_heads, size), jnp.float32)] * 2,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="last_query_sums",
    )(scores, lse, positions)


def _sums_kernel(scores_ref, lse_ref, positions_ref, verticals_ref, slashes_ref):
    """One stretch of keys and the stretch of distances at which most of them stand."""
    num_queries, size = scores_ref.shape
    key_at = pl.program_id(0) * _SUM_WIDTH
    distance_at = (pl.num_programs(0) - 1 - pl.program_id(0)) * _SUM_WIDTH
    key, distance = (at + jnp.arange(_SUM_WIDTH) for at in (key_at, distance_at))
    last = positions_ref[num_queries - 1]
    verticals = slashes = jnp.zeros((_SUM_WIDTH,), jnp.float32)
    for row in range(num_queries):
        lse = lse_ref[row]
        scores = scores_ref[row, jnp.minimum(key, size - 1)]
        verticals += jnp.exp2(scores - lse)
        seen = last - (num_queries - 1 - row) - distance  # the key at each distance
        scores = scores_ref[row, jnp.clip(seen, 0, size - 1)]
        slashes += jnp.where((seen >= 0) & (seen < size), jnp.exp2(scores - lse), 0.0)
    for ref, at, sums in ((verticals_ref, key_at, verticals), (slashes_ref, distance_at, slashes)):
        pltriton.store(ref.at[pl.ds(at, _SUM_WIDTH)], sums, mask=at + jnp.arange(_SUM_WIDTH) < size)

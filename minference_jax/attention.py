"""Causal attention for prefill: dense, and sparse with a pattern of its own for every head.

Shape letters: B batch, T queries, S keys, N query heads, K KV heads (N a multiple of K), H head_dim. Arrays are laid
out as in ``jax.nn.dot_product_attention``: q [B, T, N, H], k and v [B, S, K, H]. Everything works under ``jax.jit``
and ``jax.vmap``; gradients are not defined, because prefill needs none.

Arguments that all functions share:
  q: [B, T, N, H], float32, bfloat16 or float16.
  k, v: [B, S, K, H], same dtype.
  scale: float that multiplies the scores; None = 1 / sqrt(H).
  kv_len: int or int32 [B], valid keys of each sequence (the rest of S is padding or room); None = S.
  q_offset: int or int32 [B], absolute position of each sequence's first query, for a chunk of queries over a longer
    cache; None = 0. Row t stands at position q_offset + t and sees keys j <= q_offset + t with j < kv_len. Rows at
    positions >= kv_len are padding: they give zeros.
  return_lse: also return the log-sum-exp of the scores, float32 [B, T, N], natural log, -inf for padding.
  skip_threshold: Python number above 0 and below 1, or None = off. A tile of keys is left out, its exponentials and its
    product with the values, where exp(score - largest score of the row so far) is below it for every pair of the tile
    (skip-softmax, arXiv 2512.12087). So it depends on the tiles and their order, thus on the implementation, but not on
    padding. Each of n pairs left out of a row weighs less than the threshold t times the row's largest weight: no
    channel of the output is off by more than n t / (1 + n t) times the range of the values that the row sees, and the
    log-sum-exp, that of the other pairs, by log(1 + n t). Density counts these tiles, too. A score of NaN is never left
    out; a NaN among the values of such a tile does not show.
  implementation: "cudnn" (dense attention on NVIDIA GPUs), "mosaic_gpu" (NVIDIA GPUs of compute capability 9.0, half
    precision, head_dim a multiple of 8 from 64 to 256, from jax 0.12 on to 192), "triton" (NVIDIA GPUs of compute
    capability 8.0 or later), "xla" (everywhere), or None = the first of these that can do the call where q is, or on
    jax's default device where q is traced. With fewer than 64 queries "mosaic_gpu" is passed over, with fewer than 16
    "triton".
They raise ValueError, which says what was given and what is needed, for shapes, dtypes and sizes that do not fit, and
NotImplementedError where an implementation named by the caller can't do the call.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from minference_jax.capacities import check_pattern, is_fit
from minference_jax.implementations import Implementation, device_of, first_that_can, memory_for, named
from minference_jax.index import SlashGranularity, build_layout
from minference_jax.kernels.layouts import FAR, density
from minference_jax.kernels.tiles import DTYPES, TileConfig
from minference_jax.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    PatternArrays,
    VerticalSlash,
)


class Shared(TypedDict, total=False):
    """The arguments that all attention functions share; see the module."""

    scale: float | None
    kv_len: ArrayLike | None
    q_offset: ArrayLike | None
    skip_threshold: float | None
    implementation: str | None


class SharedSparse(Shared, total=False):
    """The arguments that all sparse attention functions share; see ``sparse_attention``."""

    slash_granularity: SlashGranularity
    max_num_blocks: int | None
    max_num_columns: int | None
    tiles: TileConfig | None
    return_lse: bool
    return_density: bool


@overload
def dense_attention(
    q: Array, k: Array, v: Array, *, return_lse: Literal[False] = False, **shared: Unpack[Shared]
) -> Array: ...
@overload
def dense_attention(
    q: Array, k: Array, v: Array, *, return_lse: bool, **shared: Unpack[Shared]
) -> Array | tuple[Array, ...]: ...
def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    kv_len: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    return_lse: bool = False,
    skip_threshold: float | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, ...]:
    """Causal attention of every query to every earlier key, in memory linear in T and S.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16. k, v: [B, S, K, H], same dtype.
      scale: multiplies the scores; None = 1 / sqrt(H).
      kv_len: int or int32 [B], valid keys; None = S.
      q_offset: int or int32 [B], absolute position of the first query; None = 0.
      return_lse: also return the log-sum-exp of the scores, float32 [B, T, N], natural log.
      skip_threshold: leaves out tiles all of whose weights are below it, against each row's largest so far; None = off.
      implementation: "cudnn", "mosaic_gpu", "triton" or "xla"; None = the first that can do the call.

    Returns:
      out [B, T, N, H] in q's dtype, or (out, lse).

    Raises:
      ValueError: shapes, dtypes or lengths do not fit.
      NotImplementedError: the named implementation can't do this call, or a gradient is asked for.
      MemoryError: the device has too little.
    """
    named(implementation)
    q, k, v, scale, kv_len, q_offset = _prepare(q, k, v, scale, kv_len, q_offset)
    static = {"scale": scale, "return_lse": return_lse, "implementation": implementation, "device": device_of(q)}
    static["skip_threshold"] = check_skip_threshold(skip_threshold)
    with memory_for(f"attention of q {_describe(q)} to k and v {_describe(k)}"):
        return _dense(q, k, v, kv_len, q_offset, **static)


@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: PatternArrays | HeadPattern,
    *,
    return_lse: Literal[False] = False,
    return_density: Literal[False] = False,
    slash_granularity: SlashGranularity = "line",
    max_num_blocks: int | None = None,
    max_num_columns: int | None = None,
    tiles: TileConfig | None = None,
    **shared: Unpack[Shared],
) -> Array: ...
@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: PatternArrays | HeadPattern,
    *,
    return_lse: bool = False,
    return_density: bool = False,
    slash_granularity: SlashGranularity = "line",
    max_num_blocks: int | None = None,
    max_num_columns: int | None = None,
    tiles: TileConfig | None = None,
    **shared: Unpack[Shared],
) -> Array | tuple[Array, ...]: ...
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    pattern: PatternArrays | HeadPattern,
    *,
    scale: float | None = None,
    kv_len: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    return_lse: bool = False,
    return_density: bool = False,
    slash_granularity: SlashGranularity = "line",
    max_num_blocks: int | None = None,
    max_num_columns: int | None = None,
    skip_threshold: float | None = None,
    implementation: str | None = None,
    tiles: TileConfig | None = None,
) -> Array | tuple[Array, ...]:
    """Causal attention in which every head computes only what its pattern keeps.

    The index is estimated from these q and k for all heads at once; the work is in proportion to what is kept.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16. k, v: [B, S, K, H], same dtype.
      pattern: PatternArrays of int32 [N], one entry per query head, usable as a jit input; or one HeadPattern for
        all heads.
      return_density: also return float32 [B, N], each head's share of the work of dense attention, in tiles.
      slash_granularity: "line" = vertical-slash heads keep single distances, as published; "block" = they keep whole
        block diagonals, aligned with the tiles: a far cheaper index, and never more tiles than "line".
      max_num_blocks: static capacity of a block-sparse head's lists, in blocks of 64 keys; each query tile of each
        head takes so many integers. None = what the pattern needs, 128 where it is traced; 0 = no head is block-sparse.
      max_num_columns: static capacity of a head's verticals or sinks, in tokens; GPU kernels copy so many keys and
        values per head. None = what the pattern needs, S where it is traced, for which `mosaic_gpu` takes too much
        memory. Heads that ask for more than a capacity, and kinds and sizes that make no sense, are refused; where
        they are traced, the head's output is NaN.
      scale: multiplies the scores; None = 1 / sqrt(H).
      kv_len: int or int32 [B], valid keys; None = S.
      q_offset: int or int32 [B], absolute position of the first query; None = 0.
      return_lse: also return the log-sum-exp of the scores, float32 [B, T, N], natural log.
      skip_threshold: leaves out tiles all of whose weights are below it, against each row's largest so far; None = off;
        see the module for how large the error may be.
      implementation: "mosaic_gpu", "triton" or "xla"; None = the first that can do the call.
      tiles: tile sizes; None = those that suit the device.

    Returns:
      out [B, T, N, H] in q's dtype, followed by lse and density where asked for.

    Raises:
      ValueError: shapes, dtypes, lengths or pattern sizes do not fit.
      NotImplementedError: the named implementation can't do this call, or a gradient is asked for.
      MemoryError: the device has too little.

    Source: arXiv 2407.02490 (MInference 1.0); heads, batches, chunks and lengths are handled together here.
    """
    named(implementation)
    if not (tiles is None or isinstance(tiles, TileConfig)):
        raise ValueError(f"{tiles=} must be a TileConfig")
    q, k, v, scale, kv_len, q_offset = _prepare(q, k, v, scale, kv_len, q_offset)
    if slash_granularity not in get_args(SlashGranularity):
        raise ValueError(f'{slash_granularity=} must be "line" or "block"')
    arrays, capacities = check_pattern(pattern, q.shape[2], k.shape[1], max_num_blocks, max_num_columns)
    static = {"scale": scale, "slash_granularity": slash_granularity, "capacities": capacities, "tiles": tiles}
    static |= {"implementation": implementation, "device": device_of(q)}
    static["skip_threshold"] = check_skip_threshold(skip_threshold)
    with memory_for(f"attention of q {_describe(q)} to k and v {_describe(k)}"):
        out, lse, share = _sparse(q, k, v, arrays, kv_len, q_offset, **static)
    results = (out, *[lse] * return_lse, *[share] * return_density)
    return results if len(results) > 1 else out


def a_shape_attention(
    q: Array, k: Array, v: Array, *, sink_size: int = 128, window_size: int = 3968, **shared: Unpack[SharedSparse]
) -> Any:
    """Causal attention to the first ``sink_size`` keys and the nearest ``window_size``, exact to the token.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H].
      sink_size: keys at the start that every query sees, in tokens.
      window_size: nearest keys that a query sees, itself included, in tokens.
      shared: all other arguments of ``sparse_attention``.

    Returns:
      out [B, T, N, H] in q's dtype, followed by lse and density where asked for.

    Raises: as ``sparse_attention``.
    """
    return sparse_attention(q, k, v, AShape(sink_size=sink_size, window_size=window_size), **shared)


def vertical_slash_attention(
    q: Array, k: Array, v: Array, *, vertical_size: int = 1000, slash_size: int = 6096, **shared: Unpack[SharedSparse]
) -> Any:
    """Causal attention to the heaviest keys (verticals) and query-key distances (slashes), found from the last queries.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H].
      vertical_size: keys that every later query sees, in tokens; at least 30 are kept.
      slash_size: distances that every query sees, in tokens; at least 50 are kept, each widened to
        tiles.
      shared: all other arguments of ``sparse_attention``.

    Returns:
      out [B, T, N, H] in q's dtype, followed by lse and density where asked for.

    Raises: as ``sparse_attention``.
    """
    return sparse_attention(q, k, v, VerticalSlash(vertical_size=vertical_size, slash_size=slash_size), **shared)


def block_sparse_attention(
    q: Array, k: Array, v: Array, *, num_blocks: int = 100, **shared: Unpack[SharedSparse]
) -> Any:
    """Causal attention to the heaviest blocks of keys for every tile of queries, found from block means.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H].
      num_blocks: blocks of 64 keys per query tile, the diagonal ones included; tiles of other sizes hold as many keys.
      shared: all other arguments of ``sparse_attention``.

    Returns:
      out [B, T, N, H] in q's dtype, followed by lse and density where asked for.

    Raises: as ``sparse_attention``.
    """
    return sparse_attention(q, k, v, BlockSparse(num_blocks=num_blocks), **shared)


@functools.partial(jax.jit, static_argnames=("scale", "return_lse", "implementation", "device", "skip_threshold"))
def _dense(q, k, v, kv_len, q_offset, *, scale, return_lse, implementation, device, skip_threshold):
    lengths = _lengths(kv_len, q_offset, q, k)

    def run(entry: Implementation, tiles: TileConfig):
        if not entry.whole_prompts_only:
            out, lse = entry.dense(q, k, v, scale=scale, tiles=tiles, skip_threshold=skip_threshold, **lengths)
            return (out, lse) if return_lse else out
        if q_offset is not None or skip_threshold is not None or return_lse:
            raise NotImplementedError("it takes no q_offset and no skip_threshold and gives no log-sum-exp")
        return entry.dense(q, k, v, scale=scale, kv_len=None if kv_len is None else lengths["kv_len"])

    return first_that_can(run, implementation, (device, q.shape[3], q.dtype.itemsize), q.shape[1])


_STATIC = ("scale", "slash_granularity", "capacities", "implementation", "device", "tiles", "skip_threshold")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _sparse(
    q, k, v, pattern, kv_len, q_offset, *, scale, slash_granularity, capacities, implementation, device, tiles, **skip
) -> tuple[Array, ...]:
    where = {"scale": scale, **_lengths(kv_len, q_offset, q, k)}

    def run(entry, suitable: TileConfig):
        if tiles is not None:
            entry.check_tiles(tiles, device, q.shape[3], q.dtype.itemsize)
        where["tiles"] = suitable if tiles is None else tiles
        layout = build_layout(
            q,
            k,
            pattern,
            max_num_blocks=capacities.num_blocks,
            max_num_columns=capacities.num_columns,
            slash_granularity=slash_granularity,
            kernels=entry.estimate,
            **where,
        )
        windows = jnp.where(is_fit(pattern, capacities, k.shape[1]), layout.windows, -1)
        out, lse = entry.sparse(q, k, v, layout._replace(windows=windows), **skip, **where)
        return out, lse, density(layout, where["q_offset"], where["kv_len"], q.shape[1], where["tiles"])

    return first_that_can(run, implementation, (device, q.shape[3], q.dtype.itemsize), q.shape[1], sparse=True)


def _lengths(kv_len: Array | None, q_offset: Array | None, q: Array, k: Array) -> dict[str, Array]:
    """Both as arrays, and inside the arrays that kernels read: traced ones could not be checked."""
    size = k.shape[1]
    kv_len = jnp.full(q.shape[:1], size, jnp.int32) if kv_len is None else jnp.clip(kv_len, 0, size)
    q_offset = jnp.zeros(q.shape[:1], jnp.int32) if q_offset is None else jnp.maximum(q_offset, 0)
    return {"kv_len": kv_len, "q_offset": q_offset}


@jax.custom_jvp
def _forward_only(x: Array) -> Array:
    return x


@_forward_only.defjvp
def _no_gradient(primals, tangents):
    raise NotImplementedError("minference_jax attention is for prefill only and has no gradient")


def _describe(x) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def _prepare(q, k, v, scale, kv_len, q_offset):
    """Checks the shared arguments; nothing is copied."""
    if not all(isinstance(x, jax.Array | np.ndarray) for x in (q, k, v)):
        raise ValueError(f"q, k and v must be arrays, not {', '.join(type(x).__name__ for x in (q, k, v))}")
    shapes = f"q {_describe(q)}, k {_describe(k)}, v {_describe(v)}"
    if not jnp.ndim(q) == jnp.ndim(k) == jnp.ndim(v) == 4:
        raise ValueError(f"{shapes}: all three must have four axes, q [B, T, N, H], k and v [B, S, K, H]")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: k and v must have one shape, and the batch and head_dim of q")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{shapes}: no axis may be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"num_heads={q.shape[2]} must be a multiple of num_kv_heads={k.shape[2]}")
    if not (str(q.dtype) in DTYPES and q.dtype == k.dtype == v.dtype):
        raise ValueError(f"{shapes}: all three must have one dtype of {', '.join(DTYPES)}")
    if q_offset is None and kv_len is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q_len={q.shape[1]} differs from kv_len={k.shape[1]}: give q_offset, kv_len or both")
    if scale is not None and not (isinstance(scale, int | float | np.floating) and math.isfinite(scale)):
        raise ValueError(f"{scale=} must be a finite Python number")
    batch, size = k.shape[:2]
    kv_len = _per_sequence("kv_len", kv_len, batch, 0, size)
    q_offset = _per_sequence("q_offset", q_offset, batch, 0, FAR - q.shape[1])
    q, k, v = (_forward_only(x) for x in (q, k, v))
    return q, k, v, q.shape[3] ** -0.5 if scale is None else float(scale), kv_len, q_offset


def check_skip_threshold(value: float | None) -> float | None:
    """Gives a threshold back as a float; ValueError: it is not one."""
    if value is None:
        return None
    if not (isinstance(value, int | float | np.floating) and 0 < value < 1):
        raise ValueError(f"skip_threshold={value!r} must be a Python number above 0 and below 1")
    return float(value)


def _per_sequence(name: str, value: ArrayLike | None, batch: int, low: int, high: int) -> Array | None:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}={value} must be an integer or integers of shape ({batch},)") from error
    if jnp.shape(value) not in ((), (batch,)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} is {_describe(value)}, it must be an integer or integers of shape ({batch},)")
    if not isinstance(value, jax.core.Tracer):
        known = np.asarray(value)  # in numpy: inside a scan even a known jax array's own min is traced
        if not (low <= known.min() and known.max() <= high):
            raise ValueError(f"{name}={known.tolist()} must lie between {low} and {high}")
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))

"""Dense and sparse attention as one Pallas kernel, lowered through Mosaic GPU: NVIDIA GPUs of the Hopper generation.

What a program does stands in ``program_mosaic_gpu``, ``warpgroup_mosaic_gpu`` and ``wide_mosaic_gpu``, and what its
steps are in ``warpgroup_steps``. The copy engine brings rows from any place: keys and values are copied into
shared memory that is swizzled, not tiled, 64 of head_dim at a time, and read as tiles of the very same bytes. So a
slash costs no more keys than it has.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels.layouts import SparseLayout, everything
from minference_jax.kernels.program_mosaic_gpu import CHUNK, COMPUTE, PRODUCER, Inputs, Program, bring_kernel
from minference_jax.kernels.softmax import valid_rows
from minference_jax.kernels.tiles import TileConfig, mosaic_gpu_moves_registers, mosaic_gpu_stage_keys
from minference_jax.kernels.warpgroup_mosaic_gpu import Warpgroup
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE, columns_of, listed_bounds, slash_steps
from minference_jax.kernels.wide_mosaic_gpu import WideWarpgroup


def dense(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    skip_threshold: float | None = None,
) -> tuple[Array, Array]:
    """Causal attention of a query chunk over a cache; arguments and results as in ``attention``.

    Blocks are 128 queries by 128 keys, whatever ``tiles`` says of them.
    """
    tiles = TileConfig(block_q=WHOLE, block_kv=WHOLE, num_stages=tiles.num_stages)
    layout = everything(q.shape[0], q.shape[2], q.shape[1], k.shape[1], tiles)
    where: dict[str, Any] = {"q_offset": q_offset, "kv_len": kv_len, "tiles": tiles}
    return attention(q, k, v, layout, scale=scale, skip_threshold=skip_threshold, **where)


def attention(
    q: Array,
    k: Array,
    v: Array,
    layout: SparseLayout,
    *,
    scale: float,
    q_offset: Array,
    kv_len: Array,
    tiles: TileConfig,
    skip_threshold: float | None = None,
) -> tuple[Array, Array]:
    """Attention over exactly the pairs of ``layout_mask(layout)``.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. bfloat16 or float16; scores and sums are float32.
      layout: of B sequences and N heads, built for ``tiles``.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys; rows at positions >= kv_len are padding.
      tiles: 64 queries by 64 keys, or 128 by 128.
      skip_threshold: as in ``minference_jax.attention``; a tile is what a warpgroup takes at a time: 64 queries by 64
        keys or 128, whatever ``tiles`` says.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; padding gives zeros and -inf.

    Raises:
      NotImplementedError: fewer than 64 queries, room for fewer than 64 keys, or for so many columns that what says
        which queries count each of them takes more memory than queries and output.
    """
    batch, q_len, num_heads, head_dim = q.shape
    kv_capacity = k.shape[1]
    if min(q_len, kv_capacity) < HALF:
        raise NotImplementedError(f"it needs {HALF} queries and keys, not {q_len} and {kv_capacity}")
    _check_columns(q, layout)
    sign = (scale > 0) - (scale < 0)  # the softmax wants a positive scale
    q = q if sign == 1 else q * sign
    v = jax.vmap(valid_rows)(v, kv_len)
    inputs = _inputs(k, v, layout, q_offset=q_offset, kv_len=kv_len, q_len=q_len, tiles=tiles)
    leaves, tree = jax.tree.flatten(inputs)
    has_columns, has_votes = inputs.columns is not None, skip_threshold is not None
    scratch = _scratch(head_dim, tiles.num_stages, q.dtype, has_columns, has_votes)
    chosen: dict[str, Any] = {"group_size": num_heads // k.shape[2], "tiles": tiles}
    chosen["log2_threshold"] = None if skip_threshold is None else math.log2(skip_threshold)
    chosen["scale"] = abs(scale) * math.log2(math.e) if sign else 1.0

    def program(q_ref, k_ref, v_ref, *refs: Any) -> None:
        given, (out_ref, lse_ref, *kept) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        held = dict(zip(scratch, kept, strict=True))
        work = Program(q_ref, k_ref, v_ref, out_ref, lse_ref, given, held, **chosen)
        number = lax.axis_index("warpgroup")
        pl.when(number == PRODUCER)(lambda: bring_kernel(work))
        warpgroup = WideWarpgroup if work.slot_keys == HALF else Warpgroup
        pl.when(number < COMPUTE)(lambda: warpgroup(work, number).compute())

    num_tiles = -(-q_len // WHOLE)
    out, lse = plgpu.kernel(
        program,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_tiles * WHOLE), jnp.float32),
        ),
        scratch_types=tuple(scratch.values()),
        grid=(batch, k.shape[2], num_tiles * chosen["group_size"]),
        grid_names=("sequence", "kv_head", "turn"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(q, k, v, *leaves)
    windows = layout.windows[..., None]
    is_real = (q_offset[:, None] + jnp.arange(q_len) < kv_len[:, None])[:, None]
    lse = jnp.where(windows < 0, jnp.nan, jnp.where(is_real, lse[..., :q_len], -jnp.inf))
    return out, lse.swapaxes(1, 2)


def _check_columns(q: Array, layout: SparseLayout) -> None:
    capacity = layout.columns.shape[-1]
    table = capacity * q.shape[0] * q.shape[2] * -(-q.shape[1] // HALF) * 2  # bytes
    if table > 2 * q.size * q.dtype.itemsize:
        raise NotImplementedError(
            f"for {capacity} columns it needs {table} bytes, more than queries and output: set max_num_columns to what "
            "heads ask for"
        )


def _inputs(k, v, layout: SparseLayout, *, q_offset, kv_len, q_len: int, tiles: TileConfig) -> Inputs:
    where: dict[str, Any] = {"q_offset": q_offset, "kv_len": kv_len, "q_len": q_len, "tiles": tiles}
    whole, split = slash_steps(layout, **where)
    listed = None
    if layout.block_ids.shape[-1]:
        ids = jnp.minimum(layout.block_ids, -(-k.shape[1] // tiles.block_kv))  # those behind the list read nothing
        room = -ids.shape[2] % (WHOLE // tiles.block_q)
        listed = (jnp.pad(ids, [(0, 0), (0, 0), (0, room), (0, 0)]), listed_bounds(layout, **where))
    columns = columns_of(k, v, layout, **where)
    return Inputs(whole, split, listed, columns, layout.windows, jnp.stack([q_offset, kv_len], axis=-1))


def _scratch(head_dim: int, stages: int, dtype: Any, has_columns: bool, has_votes: bool) -> dict[str, Any]:
    """Shared memory and barriers of one program."""
    chunks, stage_keys = -(-head_dim // CHUNK), mosaic_gpu_stage_keys(head_dim)
    keys = stage_keys if mosaic_gpu_moves_registers() else HALF
    slots = stages * stage_keys // keys
    raw = (plgpu.SwizzleTransform(128),)
    tiled = (plgpu.TilingTransform((8, CHUNK)), *raw)

    def both(*shape: int) -> plgpu.RefUnion:
        """Memory that the copy engine reaches row by row, and matrix products as tiles of the same bytes."""
        return plgpu.RefUnion(*(plgpu.SMEM(shape, dtype, transforms=form) for form in (raw, tiled)))

    # Warpgroups take turns at the tensor cores: one token goes from ``turn`` to ``turn``, and warpgroup 0 has it first.
    # "k_free" frees "first", too.
    def barrier(arrivals: int, count: int = slots) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    scratch: dict[str, Any] = {
        "q": both(COMPUTE, chunks, HALF, CHUNK),
        "k": both(slots, chunks, keys, CHUNK),
        "v": both(slots, chunks, keys, CHUNK),
        "q_here": barrier(chunks, COMPUTE),
        "k_here": barrier(keys // HALF * chunks),
        "v_here": barrier(keys // HALF * chunks),
        "k_free": barrier(COMPUTE),
        "v_free": barrier(COMPUTE),
        "turn": barrier(1, COMPUTE),
    }
    if has_columns or has_votes:  # in one piece: each takes whole KiB. The votes are the last entry.
        scratch["first"] = plgpu.SMEM((slots * has_columns + has_votes, COMPUTE, keys), jnp.bfloat16)
    if has_columns:
        scratch["first_here"] = barrier(COMPUTE)
    return scratch

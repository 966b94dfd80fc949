"""Dense and sparse attention as one Pallas kernel, lowered through Mosaic GPU: NVIDIA GPUs of the Hopper generation.

A program computes 128 queries of one head. One warpgroup brings keys and values into shared memory, step by step, and
two compute, 64 queries each, their softmaxes and matrix products in turn. What the steps are, says ``warpgroup_steps``.

The copy engine brings rows from any place: keys and values are copied into shared memory that is swizzled, not tiled,
64 of head_dim at a time, and read as tiles of the very same bytes. So a slash costs no more keys than it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels.layouts import FAR, SparseLayout, count_above, everything, tile_starts
from minference_jax.kernels.tiles import TileConfig
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE, first_rows, listed_bounds, slash_steps

_CHUNK = 64  # of head_dim, in one swizzled row of 128 bytes
_COMPUTE, _PRODUCER = 2, 2  # warpgroups that compute, and the one that brings keys and values
_REGISTERS = (232, 40)  # of a thread that computes, and of one that brings
_LAYOUT = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_ALL = ((),) if jax.__version_info__ < (0, 11) else ()  # index of plgpu.load


class _Inputs(NamedTuple):
    """What programs read in device memory; None where no head may have any.

    Attributes:
      whole, split: starts int32 [B, N, C, 2] and bounds int32 [B, N, Tq, 3] of ``Steps``.
      listed: ids int32 [B, N, Tq', C] and bounds int32 [B, N, Tq, 3].
      columns: k and v [B, N, C, H], ``first_rows`` bfloat16 [B, N, Tq, 2, C], and steps int32 [B, N, Tq].
      windows: int32 [B, N].
      lengths: int32 [B, 2], q_offset and kv_len.
    """

    whole: tuple[Array, ...]
    split: tuple[Array, ...] | None
    listed: tuple[Array, ...] | None
    columns: tuple[Array, ...] | None
    windows: Array
    lengths: Array


class _Accumulator(NamedTuple):
    """Online softmax of 64 queries; scores in units of log 2.

    Attributes:
      top: float32 [64], largest score. total: float32 [64], sum of weights. out: sums of weight * value, float32
        [64, 64] for each 64 of head_dim.
    """

    top: Array
    total: Array
    out: tuple[Array, ...]


def dense(
    q: Array, k: Array, v: Array, *, scale: float, q_offset: Array, kv_len: Array, tiles: TileConfig
) -> tuple[Array, Array]:
    """Causal attention of a query chunk over a cache; arguments and results as in ``attention``."""
    tiles = TileConfig(block_q=WHOLE, block_kv=WHOLE, num_stages=tiles.num_stages)
    layout = everything(q.shape[0], q.shape[2], q.shape[1], k.shape[1], tiles)
    return attention(q, k, v, layout, scale=scale, q_offset=q_offset, kv_len=kv_len, tiles=tiles)


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
) -> tuple[Array, Array]:
    """Attention over exactly the pairs of ``layout_mask(layout)``.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], N a multiple of K. bfloat16 or float16; scores and sums are float32.
      layout: of B sequences and N heads, built for ``tiles``.
      scale: multiplies the scores.
      q_offset: int32 [B], absolute position of the first query.
      kv_len: int32 [B], valid keys; rows at positions >= kv_len are padding.
      tiles: 64 queries by 64 keys, or 128 by 128.

    Returns:
      out [B, T, N, H] in q's dtype and lse float32 [B, T, N], natural log; padding gives zeros and -inf.
    """
    batch, q_len, num_heads, head_dim = q.shape
    kv_capacity = k.shape[1]
    if min(q_len, kv_capacity) < HALF:
        raise NotImplementedError(f"it needs {HALF} queries and keys, not {q_len} and {kv_capacity}")
    sign = (scale > 0) - (scale < 0)  # the softmax wants a positive scale
    q = q if sign == 1 else q * sign
    v = jnp.where((jnp.arange(kv_capacity) < kv_len[:, None])[:, :, None, None], v, 0)  # what is there may be NaN
    where: dict[str, Any] = {"q_offset": q_offset, "kv_len": kv_len, "q_len": q_len, "tiles": tiles}
    whole, split = slash_steps(layout, **where)
    listed = None
    if layout.block_ids.shape[-1]:
        ids = jnp.minimum(layout.block_ids, -(-kv_capacity // tiles.block_kv))  # those behind the list read nothing
        room = -ids.shape[2] % (WHOLE // tiles.block_q)
        listed = (jnp.pad(ids, [(0, 0), (0, 0), (0, room), (0, 0)]), listed_bounds(layout, **where))
    inputs = _Inputs(
        whole=whole,
        split=split,
        listed=listed,
        columns=_columns(k, v, layout, **where),
        windows=layout.windows,
        lengths=jnp.stack([q_offset, kv_len], axis=-1),
    )
    num_tiles = -(-q_len // WHOLE)
    stages = tiles.num_stages
    chunks = -(-head_dim // _CHUNK)
    raw = (plgpu.SwizzleTransform(128),)
    tiled = (plgpu.TilingTransform((8, _CHUNK)), *raw)

    def both(*shape: int) -> plgpu.RefUnion:
        """Memory that the copy engine reaches row by row, and matrix products as tiles of the same bytes."""
        return plgpu.RefUnion(*(plgpu.SMEM(shape, q.dtype, transforms=form) for form in (raw, tiled)))

    def barrier(arrivals: int, count: int = stages) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    scratch: dict[str, Any] = {
        "q": both(_COMPUTE, chunks, HALF, _CHUNK),
        "k": both(stages, chunks, WHOLE, _CHUNK),
        "v": both(stages, chunks, WHOLE, _CHUNK),
        "q_here": barrier(chunks, _COMPUTE),
        "k_here": barrier(2 * chunks),
        "v_here": barrier(2 * chunks),
        "k_free": barrier(_COMPUTE),
        "v_free": barrier(_COMPUTE),
        "turn": barrier(_COMPUTE, 1),
    }
    if inputs.columns is not None:
        scratch |= {"first": plgpu.SMEM((stages, _COMPUTE, WHOLE), jnp.bfloat16), "first_here": barrier(_COMPUTE)}
    leaves, tree = jax.tree.flatten(inputs)

    def program(*refs: Any) -> None:
        (q_ref, k_ref, v_ref), given, (out_ref, lse_ref) = (
            refs[:3],
            refs[3:][: len(leaves)],
            refs[3 + len(leaves) :][:2],
        )
        _attention_kernel(
            q_ref,
            k_ref,
            v_ref,
            jax.tree.unflatten(tree, given),
            out_ref,
            lse_ref,
            dict(zip(scratch, refs[5 + len(leaves) :], strict=True)),
            group_size=num_heads // k.shape[2],
            scale=abs(scale) * math.log2(math.e) if sign else 1.0,
            tiles=tiles,
        )

    out, lse = plgpu.kernel(
        program,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, num_tiles * WHOLE), jnp.float32),
        ),
        scratch_types=tuple(scratch.values()),
        grid=(batch, num_heads, num_tiles),
        grid_names=("sequence", "head", "tile"),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(q, k, v, *leaves)
    windows = layout.windows[..., None]
    is_real = (q_offset[:, None] + jnp.arange(q_len) < kv_len[:, None])[:, None]
    lse = jnp.where(windows < 0, jnp.nan, jnp.where(is_real, lse[..., :q_len], -jnp.inf))
    return out, lse.swapaxes(1, 2)


def _columns(k, v, layout: SparseLayout, q_offset, kv_len, q_len: int, tiles: TileConfig) -> tuple[Array, ...] | None:
    """The columns of every head side by side, or None where no head may have any."""
    if not layout.columns.shape[-1]:
        return None
    columns = jnp.pad(layout.columns, [(0, 0), (0, 0), (0, -layout.columns.shape[-1] % WHOLE)], constant_values=FAR)
    layout = layout._replace(columns=columns)
    positions = jnp.where(jnp.arange(columns.shape[-1]) < layout.column_counts[..., None], columns, FAR)
    batch, num_heads = positions.shape[:2]
    heads = jnp.arange(num_heads)[:, None] // (num_heads // k.shape[2])
    at = (jnp.arange(batch)[:, None, None], jnp.where(positions < FAR, positions, 0), heads)
    starts = tile_starts(q_offset, q_len, TileConfig(block_q=WHOLE))
    end = jnp.where(starts < kv_len[:, None], jnp.minimum(starts + WHOLE, kv_len[:, None]), 0)
    counts = count_above(-positions, -end[:, None])
    rows = first_rows(layout, q_offset, q_len, k.shape[1], tiles)
    return k[at], v[at], rows, (counts + WHOLE - 1) // WHOLE


class _Part(NamedTuple):
    """A run of steps of one program.

    Attributes:
      split: each warpgroup uses its own half; else both use all keys.
      bounds: () -> int32 (near, inside, end), as ``Steps.bounds`` of this tile.
      start: (place in the list, half) -> where the keys of that half begin in the sequence, or in the columns.
      of_columns: the keys are columns, and all steps need a mask.
    """

    split: bool
    bounds: Callable[[], tuple[Array, ...]]
    start: Callable[[Array, Array | int], Array]
    of_columns: bool = False


def _parts(inputs: _Inputs, sequence, head, tile, start, tiles: TileConfig) -> list[_Part]:
    """The steps of one program."""

    def read(bounds) -> Callable[[], tuple[Array, ...]]:
        return lambda: tuple(bounds[sequence, head, tile, i] for i in range(3))

    def of_slashes(starts, bounds, split: bool) -> _Part:
        return _Part(split, read(bounds), lambda place, half: start + starts[sequence, head, place, half])

    def listed_at(place, half):
        if tiles.block_q == HALF:
            return ids[sequence, head, 2 * tile + half, place] * HALF
        return ids[sequence, head, tile, place] * WHOLE + half * HALF

    parts = [of_slashes(*inputs.whole, split=False)]
    if inputs.split is not None:
        parts.append(of_slashes(*inputs.split, split=True))
    if inputs.listed is not None:
        ids, bounds = inputs.listed
        parts.append(_Part(tiles.block_q == HALF, read(bounds), listed_at))
    if inputs.columns is not None:
        steps = inputs.columns[-1]
        ends = lambda: (steps[sequence, head, tile],) * 3  # noqa: E731
        parts.append(_Part(False, ends, lambda place, half: place * WHOLE + half * HALF, of_columns=True))
    return parts


def _in_order(parts: list[_Part], step: Callable[[_Part, Array, Array, bool, Any], Any], carry: Any) -> Any:
    """Runs (part, place in its list, number of the step, whether it needs a mask, carry) -> carry over all steps.

    Of each part those at both ends of its list, which need a mask, come before those between.
    """
    before = jnp.int32(0)
    for part in parts:
        near, inside, end = part.bounds()
        masked = end if part.of_columns else near + end - inside

        def at_an_end(i, carry, part=part, before=before, near=near, inside=inside):
            place = i if part.of_columns else jnp.where(i < near, i, i - near + inside)
            return step(part, place, before + i, True, carry)

        def between(place, carry, part=part, first=before + masked - near):
            return step(part, place, first + place, False, carry)

        carry = lax.fori_loop(0, masked, at_an_end, carry)
        if not part.of_columns:
            carry = lax.fori_loop(near, inside, between, carry)
        before = before + end
    return carry


def _attention_kernel(
    q_ref, k_ref, v_ref, inputs: _Inputs, out_ref, lse_ref, held: dict[str, Any], *, group_size, scale, tiles
) -> None:
    """One program: 128 queries of one head."""
    sequence, head, turn = (lax.axis_index(name) for name in ("sequence", "head", "tile"))
    warpgroup = lax.axis_index("warpgroup")
    tile = lse_ref.shape[2] // WHOLE - 1 - turn  # the longest first
    start = inputs.lengths[sequence, 0] + tile * WHOLE
    parts = _parts(inputs, sequence, head, tile, start, tiles)
    (q_raw, q_tiled), (k_raw, k_tiled), (v_raw, v_tiled) = held["q"], held["k"], held["v"]
    stages, chunks = k_raw.shape[:2]

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def head_dims(chunk: int):  # zeros where head_dim ends: only a start that is not static may leave less than a chunk
        return pl.ds(turn * 0 + chunk * _CHUNK, _CHUNK)

    @pl.when(warpgroup == _PRODUCER)
    def _bring():
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")

        def bring(part: _Part, place, number):
            slot = slot_of(number)
            starts = [part.start(place, half) for half in range(2)]
            if part.of_columns:
                k_from, v_from, rows, _ = (x.at[sequence, head] for x in inputs.columns)
            else:
                kv_head = lax.div(head, jnp.int32(group_size))
                k_from, v_from = (x.at[sequence, :, kv_head] for x in (k_ref, v_ref))
            for source, to, name in ((k_from, k_raw, "k"), (v_from, v_raw, "v")):
                plgpu.barrier_wait(held[f"{name}_free"].at[slot])
                if part.of_columns and name == "k":
                    for half in range(_COMPUTE):
                        at = rows.at[tile, half, pl.ds(place * WHOLE, WHOLE)]
                        plgpu.copy_gmem_to_smem(at, held["first"].at[slot, half], held["first_here"].at[slot])
                for half, key in enumerate(starts):
                    for chunk in range(chunks):
                        at = source.at[pl.ds(key, HALF), head_dims(chunk)]
                        into = to.at[slot, chunk, pl.ds(half * HALF, HALF)]
                        plgpu.copy_gmem_to_smem(at, into, held[f"{name}_here"].at[slot])

        _in_order(parts, lambda part, place, number, masked, _: bring(part, place, number), None)

    @pl.when(warpgroup < _COMPUTE)
    def _compute():
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        rows_at = pl.ds(tile * WHOLE + warpgroup * HALF, HALF)
        for slot in range(stages):
            plgpu.barrier_arrive(held["k_free"].at[slot])
            plgpu.barrier_arrive(held["v_free"].at[slot])
        for chunk in range(chunks):
            at = q_ref.at[sequence, rows_at, head, head_dims(chunk)]
            plgpu.copy_gmem_to_smem(at, q_raw.at[warpgroup, chunk], held["q_here"].at[warpgroup])
        plgpu.barrier_wait(held["q_here"].at[warpgroup])
        own = pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)

        def take_turns():
            plgpu.barrier_arrive(held["turn"])
            plgpu.barrier_wait(held["turn"])

        def seen(shape, part: _Part, place, slot):
            row, column = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=_LAYOUT) for i in range(2))
            if part.of_columns:
                first = plgpu.load(held["first"].at[slot, warpgroup], *_ALL, layout=_COLUMNS, optimized=False)
                return row.astype(jnp.float32) >= lax.broadcast_in_dim(first.astype(jnp.float32), shape, [1])
            key = part.start(place, warpgroup if part.split else 0)
            distance = row - column + (start + warpgroup * HALF - key)
            return (distance >= 0) & (distance < inputs.windows[sequence, head]) & (column + key >= 0)

        def add(acc: _Accumulator, slot, keys, mask) -> _Accumulator:
            """Adds these keys of a slot; ``mask`` gives what queries see of scores of a shape, None = all."""

            def scores_into(ref):
                for chunk in range(chunks):
                    plgpu.wgmma(ref, q_tiled.at[warpgroup, chunk], _transposed(k_tiled.at[slot, chunk, keys]))
                take_turns()
                return ref[...]

            plgpu.barrier_wait(held["k_here"].at[slot])
            scores = pl.run_scoped(scores_into, plgpu.ACC((HALF, keys.size), jnp.float32))
            if mask is not None:
                scores = jnp.where(mask(scores.shape), scores, -jnp.inf)
            plgpu.barrier_arrive(held["k_free"].at[slot])
            top = jnp.maximum(acc.top, scores.max(axis=1) * scale)
            decay = jnp.exp2(acc.top - top)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(top, scores.shape, [0]))
            out = tuple(x * lax.broadcast_in_dim(decay, x.shape, [0]) for x in acc.out)
            total = acc.total * decay + weights.sum(axis=1)
            weights = weights.astype(q_ref.dtype)
            out, total, top, weights = lax.optimization_barrier((out, total, top, weights))
            plgpu.barrier_arrive(held["turn"])
            plgpu.barrier_wait(held["v_here"].at[slot])
            plgpu.barrier_wait(held["turn"])

            def values_into(refs):
                for chunk, ref in enumerate(refs):
                    plgpu.wgmma(ref, weights, v_tiled.at[slot, chunk, keys])

            out = pl.run_state(values_into)(tuple(plgpu.ACC.init(x) for x in out))
            plgpu.barrier_arrive(held["v_free"].at[slot])
            return _Accumulator(top, total, out)

        def step(part: _Part, place, number, masked: bool, acc: _Accumulator) -> _Accumulator:
            slot = slot_of(number)
            mask = None
            if masked:
                mask = functools.partial(seen, part=part, place=place, slot=slot)
            if part.of_columns:
                plgpu.barrier_wait(held["first_here"].at[slot])
            return add(acc, slot, own if part.split else pl.ds(0, WHOLE), mask)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), _ROWS)

        zeros = plgpu.layout_cast(jnp.zeros((HALF, _CHUNK), jnp.float32), _LAYOUT)
        acc = _Accumulator(rows_of(float(jnp.finfo(jnp.float32).min) / 2), rows_of(0.0), (zeros,) * chunks)
        pl.when(warpgroup == 1)(take_turns)
        acc = _in_order(parts, step, acc)
        pl.when(warpgroup == 0)(take_turns)
        window = inputs.windows[sequence, head]
        has_keys = acc.total > 0
        total = jnp.where(has_keys, acc.total, 1.0)
        row = plgpu.broadcasted_iota(jnp.int32, zeros.shape, 0, layout=_LAYOUT)
        is_real = row < jnp.where(window < 0, -1, inputs.lengths[sequence, 1] - start - warpgroup * HALF)
        nothing = jnp.where(window < 0, jnp.nan, 0.0)
        for chunk, out in enumerate(acc.out):
            out = jnp.where(is_real, out / lax.broadcast_in_dim(total, out.shape, [0]), nothing)
            q_tiled.at[warpgroup, chunk][...] = out.astype(q_ref.dtype)
        lse_ref.at[sequence, head, rows_at][...] = jnp.where(has_keys, acc.top * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        for chunk in range(chunks):
            at = out_ref.at[sequence, rows_at, head, head_dims(chunk)]
            plgpu.copy_smem_to_gmem(q_raw.at[warpgroup, chunk], at)
        plgpu.wait_smem_to_gmem(0)


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 12) else ref.transpose((1, 0))

"""The program of the Mosaic GPU kernel: 128 queries of one head, three warpgroups.

One brings keys and values into shared memory, step by step; two compute, 64 queries each, their softmaxes and matrix
products in turn.
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

from minference_jax.kernels.tiles import TileConfig
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE, Columns

CHUNK = 64
"""Of head_dim, in one swizzled row of 128 bytes."""
COMPUTE, PRODUCER = 2, 2
"""Warpgroups that compute, and the one that brings keys and values."""
_REGISTERS = (232, 40)  # of a thread that computes, and of one that brings
_LAYOUT = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)
_ALL = ((),) if jax.__version_info__ < (0, 11) else ()  # index of plgpu.load


class Inputs(NamedTuple):
    """What programs read in device memory; None where no head may have any.

    Attributes:
      whole, split: starts int32 [B, N, C, 2] and bounds int32 [B, N, Tq, 3] of ``Steps``.
      listed: ids int32 [B, N, Tq', C] and bounds int32 [B, N, Tq, 3].
      columns: those that heads keep.
      windows: int32 [B, N].
      lengths: int32 [B, 2], q_offset and kv_len.
    """

    whole: tuple[Array, ...]
    split: tuple[Array, ...] | None
    listed: tuple[Array, ...] | None
    columns: Columns | None
    windows: Array
    lengths: Array


class Program(NamedTuple):
    """What one program works on.

    Attributes:
      q, k, v, out, lse: refs to device memory, as in ``sparse_mosaic_gpu.attention``; lse [B, N, T].
      inputs: ``Inputs`` of refs to the rest.
      held: refs to shared memory and barriers by name.
      group_size: query heads of a KV head. scale: positive, in units of log 2. tiles: of the layout.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    inputs: Any
    held: dict[str, Any]
    group_size: int
    scale: float
    tiles: TileConfig

    @property
    def place(self) -> tuple[Array, Array, Array]:
        """Sequence, head and tile; the longest tiles come first."""
        sequence, head, turn = (lax.axis_index(name) for name in ("sequence", "head", "tile"))
        return sequence, head, self.lse.shape[2] // WHOLE - 1 - turn

    @property
    def start(self) -> Array:
        """Absolute position of the tile's first query."""
        sequence, _, tile = self.place
        return self.inputs.lengths[sequence, 0] + tile * WHOLE

    @property
    def chunks(self) -> int:
        """Parts of head_dim."""
        return self.held["k"][0].shape[1]

    def slot(self, number: Array) -> Array:
        """Where step ``number`` lies in shared memory."""
        return lax.rem(number, jnp.int32(self.tiles.num_stages))

    def head_dims(self, chunk: int) -> Any:
        """A part of head_dim, zeros where it ends: only a start that is not static may leave less than a chunk."""
        return pl.ds(lax.axis_index("tile") * 0 + chunk * CHUNK, CHUNK)


class _Accumulator(NamedTuple):
    """Online softmax of 64 queries; scores in units of log 2.

    Attributes:
      top: float32 [64], largest score. total: float32 [64], sum of weights. out: sums of weight * value, float32
        [64, 64] for each 64 of head_dim.
    """

    top: Array
    total: Array
    out: tuple[Array, ...]


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


def _parts(program: Program) -> list[_Part]:
    """The steps of one program."""
    inputs, tiles, start = program.inputs, program.tiles, program.start
    sequence, head, tile = program.place

    def read(bounds) -> Callable[[], tuple[Array, ...]]:
        return lambda: tuple(bounds[sequence, head, tile, i] for i in range(3))

    def of_slashes(steps, split: bool) -> _Part:
        starts, bounds = steps
        return _Part(split, read(bounds), lambda place, half: start + starts[sequence, head, place, half])

    def listed_at(place, half):
        if tiles.block_q == HALF:
            return ids[sequence, head, 2 * tile + half, place] * HALF
        return ids[sequence, head, tile, place] * WHOLE + half * HALF

    parts = [of_slashes(inputs.whole, split=False)]
    if inputs.split is not None:
        parts.append(of_slashes(inputs.split, split=True))
    if inputs.listed is not None:
        ids, bounds = inputs.listed
        parts.append(_Part(tiles.block_q == HALF, read(bounds), listed_at))
    if inputs.columns is not None:
        steps = inputs.columns.steps
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


def attention_kernel(program: Program) -> None:
    """One program."""
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == PRODUCER)(functools.partial(_bring_kernel, program))
    pl.when(warpgroup < COMPUTE)(functools.partial(_compute_kernel, program, warpgroup))


def _bring_kernel(program: Program) -> None:
    """The warpgroup that brings keys and values."""
    inputs, held, chunks = program.inputs, program.held, program.chunks
    sequence, head, tile = program.place
    k_raw, v_raw = held["k"][0], held["v"][0]
    plgpu.set_max_registers(_REGISTERS[1], action="decrease")

    def bring(part: _Part, place, number):
        slot = program.slot(number)
        starts = [part.start(place, half) for half in range(2)]
        if part.of_columns:
            k_from, v_from, rows, _ = (x.at[sequence, head] for x in inputs.columns)
        else:
            kv_head = lax.div(head, jnp.int32(program.group_size))
            k_from, v_from = (x.at[sequence, :, kv_head] for x in (program.k, program.v))
        for source, to, name in ((k_from, k_raw, "k"), (v_from, v_raw, "v")):
            plgpu.barrier_wait(held[f"{name}_free"].at[slot])
            if part.of_columns and name == "k":
                for half in range(COMPUTE):
                    at = rows.at[tile, half, pl.ds(place * WHOLE, WHOLE)]
                    plgpu.copy_gmem_to_smem(at, held["first"].at[slot, half], held["first_here"].at[slot])
            for half, key in enumerate(starts):
                for chunk in range(chunks):
                    at = source.at[pl.ds(key, HALF), program.head_dims(chunk)]
                    into = to.at[slot, chunk, pl.ds(half * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(at, into, held[f"{name}_here"].at[slot])

    _in_order(_parts(program), lambda part, place, number, masked, _: bring(part, place, number), None)


def _compute_kernel(program: Program, warpgroup: Array) -> None:
    """A warpgroup that computes."""
    inputs, held, chunks, scale = program.inputs, program.held, program.chunks, program.scale
    sequence, head, tile = program.place
    start = program.start
    (q_raw, q_tiled), k_tiled, v_tiled = held["q"], held["k"][1], held["v"][1]
    plgpu.set_max_registers(_REGISTERS[0], action="increase")
    rows_at = pl.ds(tile * WHOLE + warpgroup * HALF, HALF)
    for slot in range(program.tiles.num_stages):
        plgpu.barrier_arrive(held["k_free"].at[slot])
        plgpu.barrier_arrive(held["v_free"].at[slot])
    for chunk in range(chunks):
        at = program.q.at[sequence, rows_at, head, program.head_dims(chunk)]
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
        weights = weights.astype(program.q.dtype)
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
        slot = program.slot(number)
        mask = None
        if masked:
            mask = functools.partial(seen, part=part, place=place, slot=slot)
        if part.of_columns:
            plgpu.barrier_wait(held["first_here"].at[slot])
        return add(acc, slot, own if part.split else pl.ds(0, WHOLE), mask)

    def rows_of(value):
        return plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), _ROWS)

    zeros = plgpu.layout_cast(jnp.zeros((HALF, CHUNK), jnp.float32), _LAYOUT)
    acc = _Accumulator(rows_of(float(jnp.finfo(jnp.float32).min) / 2), rows_of(0.0), (zeros,) * chunks)
    pl.when(warpgroup == 1)(take_turns)
    acc = _in_order(_parts(program), step, acc)
    pl.when(warpgroup == 0)(take_turns)
    window = inputs.windows[sequence, head]
    has_keys = acc.total > 0
    total = jnp.where(has_keys, acc.total, 1.0)
    row = plgpu.broadcasted_iota(jnp.int32, zeros.shape, 0, layout=_LAYOUT)
    is_real = row < jnp.where(window < 0, -1, inputs.lengths[sequence, 1] - start - warpgroup * HALF)
    nothing = jnp.where(window < 0, jnp.nan, 0.0)
    for chunk, out in enumerate(acc.out):
        out = jnp.where(is_real, out / lax.broadcast_in_dim(total, out.shape, [0]), nothing)
        q_tiled.at[warpgroup, chunk][...] = out.astype(program.q.dtype)
    program.lse.at[sequence, head, rows_at][...] = jnp.where(has_keys, acc.top * math.log(2) + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    for chunk in range(chunks):
        at = program.out.at[sequence, rows_at, head, program.head_dims(chunk)]
        plgpu.copy_smem_to_gmem(q_raw.at[warpgroup, chunk], at)
    plgpu.wait_smem_to_gmem(0)


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 12) else ref.transpose((1, 0))

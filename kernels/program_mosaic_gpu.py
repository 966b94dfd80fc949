"""The program of the Mosaic GPU kernel: 128 queries of one head, three warpgroups.

One brings keys and values into shared memory, step by step; two compute, 64 queries each (``warpgroup_mosaic_gpu``, or
``wide_mosaic_gpu`` where registers are few).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels.tiles import TileConfig
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE, Columns

CHUNK = 64
"""Of head_dim, in one swizzled row of 128 bytes."""
COMPUTE = 2
"""Warpgroups that compute."""
PRODUCER = 2
"""The number of the warpgroup that brings keys and values, behind those that compute."""
REGISTERS = (240, 24)
"""Of a thread that computes, and of one that brings: in all no more than three times 168, with which they start."""


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
      q, k, v, out, lse: refs to device memory, as in ``sparse_mosaic_gpu.attention``; lse [B, N, T], T in whole tiles.
      inputs: ``Inputs`` of refs to the rest.
      held: refs to shared memory and barriers by name.
      group_size: query heads of a KV head. scale: positive, in units of log 2. tiles: of the layout.
      log2_threshold: of the weight below which a warpgroup leaves out a step; None = it takes all.
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
    log2_threshold: float | None

    @property
    def place(self) -> tuple[Array, Array, Array]:
        """Sequence, head and tile.

        Of a KV head the longest tiles come first, each for all query heads: programs that run beside each other find
        more of their keys in the cache.
        """
        sequence, kv_head, turn = (lax.axis_index(name) for name in ("sequence", "kv_head", "turn"))
        group_size = jnp.int32(self.group_size)
        head = kv_head * group_size + lax.rem(turn, group_size)
        return sequence, head, self.lse.shape[2] // WHOLE - 1 - lax.div(turn, group_size)

    @property
    def start(self) -> Array:
        """Absolute position of the tile's first query."""
        sequence, _, tile = self.place
        return self.inputs.lengths[sequence, 0] + tile * WHOLE

    @property
    def chunks(self) -> int:
        """Parts of head_dim."""
        return self.held["k"][0].shape[1]

    @property
    def slots(self) -> int:
        """Of shared memory, for keys and as many for values."""
        return self.held["k"][0].shape[0]

    @property
    def slot_keys(self) -> int:
        """Keys of a slot: those of a step, or of half of one."""
        return self.held["k"][0].shape[2]

    def slot(self, number: Array, half: Array | int = 0) -> Array:
        """Where step ``number`` lies in shared memory, or a half of it that has a slot to itself."""
        pieces, slots = WHOLE // self.slot_keys, self.slots
        if slots % pieces:
            return lax.rem(number * pieces + half, jnp.int32(slots))
        return lax.rem(number, jnp.int32(slots // pieces)) * pieces + half  # the same, in fewer registers

    def head_dims(self, chunk: int) -> Any:
        """A part of head_dim, zeros where it ends: only a start that is not static may leave less than a chunk."""
        return pl.ds(lax.axis_index("turn") * 0 + chunk * CHUNK, CHUNK)


class Part(NamedTuple):
    """A run of steps of one program.

    Attributes:
      split: each warpgroup uses its own half; else both use all keys.
      bounds: () -> int32 (near, inside, end), as ``Steps.bounds`` of this tile.
      start: (place in the list, half) -> where the keys of that half begin in the sequence, or in the columns. Halves
        that both warpgroups use lie side by side.
      of_columns: the keys are columns, and all steps need a mask.
    """

    split: bool
    bounds: Callable[[], tuple[Array, ...]]
    start: Callable[[Array, Array | int], Array]
    of_columns: bool = False


def parts_of(program: Program) -> list[Part]:
    """The steps of one program."""
    inputs, tiles, start = program.inputs, program.tiles, program.start
    sequence, head, tile = program.place

    def read(bounds) -> Callable[[], tuple[Array, ...]]:
        return lambda: tuple(bounds[sequence, head, tile, i] for i in range(3))

    def of_slashes(steps, split: bool) -> Part:
        starts, bounds = steps
        return Part(split, read(bounds), lambda place, half: start + starts[sequence, head, place, half])

    def listed_at(place, half):
        if tiles.block_q == HALF:
            return ids[sequence, head, 2 * tile + half, place] * HALF
        return ids[sequence, head, tile, place] * WHOLE + half * HALF

    parts = [of_slashes(inputs.whole, split=False)]
    if inputs.split is not None:
        parts.append(of_slashes(inputs.split, split=True))
    if inputs.listed is not None:
        ids, bounds = inputs.listed
        parts.append(Part(tiles.block_q == HALF, read(bounds), listed_at))
    if inputs.columns is not None:
        steps = inputs.columns.steps
        ends = lambda: (steps[sequence, head, tile],) * 3  # noqa: E731
        parts.append(Part(False, ends, lambda place, half: place * WHOLE + half * HALF, of_columns=True))
    return parts


class Order(NamedTuple):
    """The steps of a part, in the order they are taken: those at both ends of its list need a mask and come first.

    Attributes:
      number: of the first step, among all of the program.
      near, inside, end: as ``Part.bounds``.
      masked: how many come first.
    """

    number: Array
    near: Array
    inside: Array
    end: Array
    masked: Array

    def at_an_end(self, i: Array) -> Array:
        """Place in the list of step i < masked."""
        return jnp.where(i < self.near, i, i - self.near + self.inside)

    def number_between(self, place: Array) -> Array:
        """Number of a step that needs no mask."""
        return self.number + self.masked - self.near + place


def in_order(parts: list[Part], run: Callable[[Part, Order, Any], Any], carry: Any = None) -> Any:
    """Runs (part, its order, carry) -> carry over the parts; bounds are read where a part begins."""
    number = jnp.int32(0)
    for part in parts:
        near, inside, end = part.bounds()
        near, inside = (jnp.int32(0), jnp.int32(0)) if part.of_columns else (near, inside)
        carry = run(part, Order(number, near, inside, end, near + end - inside), carry)
        number = number + end
    return carry


def bring_kernel(program: Program) -> None:
    """The warpgroup that brings keys and values."""
    plgpu.set_max_registers(REGISTERS[1], action="decrease")

    def bring_all(part: Part, order: Order, _) -> None:
        def at_an_end(i, _):
            _bring(program, part, order.at_an_end(i), order.number + i)

        def between(place, _):
            _bring(program, part, place, order.number_between(place))

        lax.fori_loop(0, order.masked, at_an_end, None)
        lax.fori_loop(order.near, order.inside, between, None)

    in_order(parts_of(program), bring_all)


def _bring(program: Program, part: Part, place: Array, number: Array) -> None:
    """One step."""
    inputs, held = program.inputs, program.held
    sequence, head, tile = program.place
    width = program.slot_keys
    slots = [program.slot(number, piece) for piece in range(WHOLE // width)]
    starts = [part.start(place, half) for half in range(WHOLE // HALF)]
    if part.of_columns:
        k_from, v_from, rows, _ = (x.at[sequence, head] for x in inputs.columns)
    else:
        kv_head = lax.axis_index("kv_head")
        k_from, v_from = (x.at[sequence, :, kv_head] for x in (program.k, program.v))
    for piece, (source, name) in itertools.product(range(WHOLE // width), ((k_from, "k"), (v_from, "v"))):
        slot = slots[piece]
        plgpu.barrier_wait(held[f"{name}_free"].at[slot])
        if part.of_columns and name == "k":
            for warpgroup in range(COMPUTE):
                at = rows.at[tile, warpgroup, pl.ds(place * WHOLE + piece * width, width)]
                plgpu.copy_gmem_to_smem(at, held["first"].at[slot, warpgroup], held["first_here"].at[slot])
        for half in range(width // HALF):
            for chunk in range(program.chunks):
                at = source.at[pl.ds(starts[piece + half], HALF), program.head_dims(chunk)]
                into = held[name][0].at[slot, chunk, pl.ds(half * HALF, HALF)]
                plgpu.copy_gmem_to_smem(at, into, held[f"{name}_here"].at[slot])

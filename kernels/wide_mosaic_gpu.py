"""What a computing warpgroup of the Mosaic GPU kernel does where registers are few: 64 queries, 64 keys at a time.

Where head_dim is above 128, the sums of weight * value alone take half of a thread's registers and more; and where
threads get no more than they start with (``mosaic_gpu_moves_registers``), few are left at any head_dim. So the scores
of half a step, their softmax and the product with the values follow each other, and each half has a slot of shared
memory to itself. The warpgroup has the turn at the tensor cores from the values of one half to the scores of the next;
in between the other has it.

Barriers of optimization keep addresses from being held in registers from step to step.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels.program_mosaic_gpu import Order, Part
from minference_jax.kernels.warpgroup_mosaic_gpu import LAYOUT, Accumulator, Warpgroup
from minference_jax.kernels.warpgroup_steps import HALF


class WideWarpgroup(Warpgroup):
    """One of the two that compute; see ``Warpgroup``."""

    def keys(self, part: Part) -> Any:
        """Those of a slot that it uses."""
        return pl.ds(0, HALF)

    def run(self, part: Part, order: Order, acc: Accumulator) -> Accumulator:
        """All steps of a part. It has the turn before and after each half."""
        halves = 1 if part.split else 2

        def at_an_end(i, acc):
            i, half = lax.div(i, halves), lax.rem(i, halves)
            return self.take(part, order.at_an_end(i), order.number + i, half, True, acc)

        def between(i, acc):
            place, half = lax.div(i, halves), lax.rem(i, halves)
            return self.take(part, place, order.number_between(place), half, False, acc)

        acc = lax.fori_loop(0, order.masked * halves, at_an_end, acc)
        if part.of_columns:
            return acc
        return lax.fori_loop(order.near * halves, order.inside * halves, between, acc)

    def take(self, part: Part, place, number, half, masked: bool, acc: Accumulator) -> Accumulator:
        """Half a step that both use, or a step of which each uses its own half."""
        if not part.split:
            return self.take_half(part, place, number, half, masked, acc)
        pl.when(self.number == 1)(lambda: self.pass_by(number))
        acc = self.take_half(part, place, number, self.number, masked, acc)
        pl.when(self.number == 0)(lambda: self.pass_by(number))
        return acc

    def pass_by(self, number) -> None:
        """Frees the half of a split step that only the other warpgroup uses."""
        held, slot = self.program.held, self.slot(number, 1 - self.number)
        for name in "kv":
            plgpu.barrier_wait(held[f"{name}_here"].at[slot])
            plgpu.barrier_arrive(held[f"{name}_free"].at[slot])

    def take_half(self, part: Part, place, number, half, masked: bool, acc: Accumulator) -> Accumulator:
        """Half a step: its scores, their softmax, and the weights times the values."""
        slot = self.slot(number, half)
        scores = self.mask(part, place, slot, half, self.scores(part, slot), masked)
        return self.finish(part, slot, *self.soften(number, acc, scores))

    def place_of_votes(self, number) -> Array:
        """The only one."""
        return lax.optimization_barrier(jnp.int32(0))

    def matter(self, acc: Accumulator, largest, number) -> Array:
        """As of ``Warpgroup``; before the next votes are stored, all warps have read these."""
        matter = super().matter(acc, largest, number)
        plgpu.commit_smem()
        return matter

    def slot(self, number, half) -> Array:
        """Where half a step lies."""
        return lax.optimization_barrier(self.program.slot(number, half))

    def scores(self, part: Part, slot) -> Array:
        """Queries times the keys of a slot: float32 [64, 64]. Passes the turn."""
        warpgroup = self._replace(number=lax.optimization_barrier(self.number))

        def run(scores):
            warpgroup.add_scores(scores, slot, self.keys(part))
            plgpu.barrier_arrive(self.others_turn)

        plgpu.barrier_wait(self.program.held["k_here"].at[slot])
        nothing = plgpu.layout_cast(jnp.zeros((HALF, HALF), jnp.float32), LAYOUT)
        return pl.run_state(run)(plgpu.ACC.init(nothing))

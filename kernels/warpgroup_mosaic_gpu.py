"""What a computing warpgroup of the Mosaic GPU kernel does: 64 queries, online softmax over the steps of its program.

The scores of a step are computed in the same turn at the tensor cores as the values of the step before, while the other
warpgroup works on its softmax; then the two change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels.program_mosaic_gpu import CHUNK, REGISTERS, Order, Part, Program, in_order, parts_of
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE

LAYOUT = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)
_ALL = ((),) if jax.__version_info__ < (0, 11) else ()  # index of plgpu.load


class Accumulator(NamedTuple):
    """Online softmax of 64 queries; scores in units of log 2.

    Attributes:
      top: float32 [64], largest score. total: float32 [64], sum of weights. out: sums of weight * value, float32
        [64, 64] for each 64 of head_dim.
    """

    top: Array
    total: Array
    out: tuple[Array, ...]


class Pending(NamedTuple):
    """The weights of a step whose values are still to be added.

    Attributes:
      weights: [64, keys], in the dtype of the values.
      matter: int32 [], 0 where the step is left out; None where none ever is.
    """

    weights: Array
    matter: Array | None

    def unless_left_out(self, add: Callable[..., Any], leave: Callable[..., Any], *values: Any) -> Any:
        """What one of the two gives of the values."""
        return add(*values) if self.matter is None else lax.cond(self.matter > 0, add, leave, *values)


class Warpgroup(NamedTuple):
    """One of the two that compute.

    Attributes:
      program: what it works on. number: 0 or 1.
      say: float32 [64], 1 for queries that have a say in what is left out, 0 for padding; None where nothing is.
    """

    program: Program
    number: Array
    say: Any = None

    @property
    def rows(self) -> Any:
        """Its queries."""
        return pl.ds(self.program.place[2] * WHOLE + self.number * HALF, HALF)

    @property
    def turn(self) -> Any:
        """Its own turn at the tensor cores."""
        return self.program.held["turn"].at[self.number]

    @property
    def others_turn(self) -> Any:
        """That of the other warpgroup."""
        return self.program.held["turn"].at[1 - self.number]

    def keys(self, part: Part) -> Any:
        """Those of a step that it uses."""
        return pl.ds(pl.multiple_of(self.number * HALF, HALF), HALF) if part.split else pl.ds(0, WHOLE)

    def compute(self) -> None:
        """All that it does."""
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        self.begin()
        zeros = plgpu.layout_cast(jnp.zeros((HALF, CHUNK), jnp.float32), LAYOUT)
        top, total = (
            plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), _ROWS)
            for value in (float(jnp.finfo(jnp.float32).min) / 2, 0.0)
        )
        acc = Accumulator(top, total, (zeros,) * self.program.chunks)
        pl.when(self.number == 1)(lambda: plgpu.barrier_wait(self.turn))
        voting = self if self.program.log2_threshold is None else self._replace(say=self.real_rows())
        acc = in_order(parts_of(self.program), voting.run, acc)
        pl.when(self.number == 0)(lambda: plgpu.barrier_arrive(self.others_turn))
        self.write(acc)

    def real_rows(self) -> Array:
        """Its queries that are no padding: float32 [64], 1 or 0."""
        program = self.program
        row = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=_ROWS) + self.rows.start
        sequence = program.place[0]
        end = jnp.minimum(program.inputs.lengths[sequence, 1] - program.inputs.lengths[sequence, 0], program.q.shape[1])
        return jnp.where(row < end, 1.0, 0.0)

    def begin(self) -> None:
        """Frees all of shared memory and waits for the queries."""
        program, held = self.program, self.program.held
        for slot in range(program.slots):
            plgpu.barrier_arrive(held["k_free"].at[slot])
            plgpu.barrier_arrive(held["v_free"].at[slot])
        sequence, head, _ = program.place
        for chunk in range(program.chunks):
            at = program.q.at[sequence, self.rows, head, program.head_dims(chunk)]
            plgpu.copy_gmem_to_smem(at, held["q"][0].at[self.number, chunk], held["q_here"].at[self.number])
        plgpu.barrier_wait(held["q_here"].at[self.number])

    def run(self, part: Part, order: Order, acc: Accumulator) -> Accumulator:
        """All steps of a part. It has the turn before and after, so the first step does not wait for it."""
        has_any = jnp.minimum(order.end, 1)
        has_masked = jnp.minimum(order.masked, 1)

        def first(_, carry):
            place = jnp.where(has_masked > 0, order.at_an_end(jnp.int32(0)), 0)
            return self.step(part, place, order.number, True, carry[0], None)

        def at_an_end(i, carry):
            return self.step(part, order.at_an_end(i), order.number + i, True, *carry)

        def between(place, carry):
            return self.step(part, place, order.number_between(place), False, *carry)

        carry = lax.fori_loop(0, has_any, first, (acc, self.nothing(part)))
        carry = lax.fori_loop(1, order.masked, at_an_end, carry)
        if not part.of_columns:
            carry = lax.fori_loop(order.near + 1 - has_masked, order.inside, between, carry)
        acc, pending = carry
        last = order.number + order.end - 1
        slot = self.program.slot(last)
        return lax.fori_loop(0, has_any, lambda _, acc: self.finish(part, slot, acc, pending), acc)

    def nothing(self, part: Part) -> Pending:
        """No weights."""
        weights = plgpu.layout_cast(jnp.zeros((HALF, self.keys(part).size), self.program.q.dtype), LAYOUT)
        return Pending(weights, None if self.program.log2_threshold is None else jnp.int32(0))

    def step(
        self, part: Part, place, number, masked: bool, acc: Accumulator, pending: Pending | None
    ) -> tuple[Accumulator, Pending]:
        """Adds the scores of one step, and the values of the one before: ``pending``, None = there is none.

        Returns:
          The accumulator without the values of this step, and their weights.
        """
        slot, half = self.program.slot(number), self.number if part.split else 0
        mask = lambda scores: self.mask(part, place, slot, half, scores, masked)  # noqa: E731
        if pending is not None and self.program.log2_threshold is None:
            return self.overlap(part, number, mask, acc, pending)
        acc, scores = self.multiply(part, number, acc, pending)
        return self.soften(number, acc, mask(scores))

    def mask(self, part: Part, place, slot, half, scores, masked: bool) -> Array:
        """The scores of keys from the beginning of a half on, -inf where they must not count. Frees the keys."""
        held = self.program.held
        if part.of_columns:
            plgpu.barrier_wait(held["first_here"].at[slot])
        if masked:
            scores = jnp.where(self.seen(part, place, slot, half), scores, -jnp.inf)
        plgpu.barrier_arrive(held["k_free"].at[slot])
        return scores

    def soften(self, number, acc: Accumulator, scores) -> tuple[Accumulator, Pending]:
        """The softmax of a step's scores, unless it is left out."""
        largest = scores.max(axis=1) * self.program.scale
        if self.program.log2_threshold is None:
            acc, weights = self.weigh(acc, scores, largest)
            return acc, Pending(weights, None)
        matter = self.matter(acc, largest, number)
        leave = lambda acc, scores, _: (acc, scores.astype(self.program.q.dtype))  # noqa: E731
        acc, weights = lax.cond(matter > 0, self.weigh, leave, acc, scores, largest)
        return acc, Pending(weights, matter)

    def matter(self, acc: Accumulator, largest, number) -> Array:
        """Whether any query needs a step: int32 [], 0 = none does. Those of padding have no say, and NaN is needed."""
        program, first = self.program, self.program.held["first"]
        threshold: Any = program.log2_threshold
        place = pl.ds(pl.multiple_of(self.place_of_votes(number) * HALF, HALF), HALF)
        votes = first.at[first.shape[0] - 1, self.number, place]
        below = largest < acc.top + threshold
        votes[...] = jnp.where(below, 0.0, self.say).astype(jnp.bfloat16)
        plgpu.commit_smem()  # the warps wait for each other
        return plgpu.load(votes, *_ALL, layout=_COLUMNS, optimized=False).max().astype(jnp.int32)

    def place_of_votes(self, number) -> Array:
        """One of two in turn: until all have read one, the barrier of the next step keeps it."""
        return lax.rem(number, jnp.int32(2))

    def overlap(
        self, part: Part, number, mask: Callable[[Array], Array], acc: Accumulator, pending: Pending
    ) -> tuple[Accumulator, Pending]:
        """As ``multiply`` and ``soften``, with the softmax beside the product of weights and values."""
        program, held = self.program, self.program.held
        slot, last, keys = program.slot(number), program.slot(number - 1), self.keys(part)

        def run(refs):
            sums, softmax, outs = refs
            top, total, decay, weights = softmax
            self.add_scores(sums, slot, keys)
            self.add_values(outs, pending.weights, last, keys)
            plgpu.barrier_arrive(self.others_turn)
            scores = lax.optimization_barrier(plgpu.wgmma_accumulator_load(sums, wait_n=program.chunks))
            top[...], total[...], decay[...], weights[...] = self.softmax(top[...], total[...], mask(scores))

        plgpu.barrier_wait(held["k_here"].at[slot])
        plgpu.barrier_wait(held["v_here"].at[last])
        plgpu.barrier_wait(self.turn)
        nothing = plgpu.layout_cast(jnp.zeros((HALF, keys.size), jnp.float32), LAYOUT)
        softmax = (acc.top, acc.total, acc.top, nothing)
        sums = (plgpu.ACC.init(nothing), softmax, tuple(plgpu.ACC.init(x) for x in acc.out))
        _, (top, total, decay, weights), out = pl.run_state(run)(sums)
        plgpu.barrier_arrive(held["v_free"].at[last])
        weights = weights.astype(program.q.dtype)  # not before: products in flight still read those of the step before
        out, weights = lax.optimization_barrier((_scaled(out, decay), weights))
        return Accumulator(top, total, out), Pending(weights, None)

    def multiply(self, part: Part, number, acc: Accumulator, pending: Pending | None) -> tuple[Accumulator, Array]:
        """At the tensor cores: the scores of a step, and the pending weights times the values of the one before."""
        program, held = self.program, self.program.held
        slot, last, keys = program.slot(number), program.slot(number - 1), self.keys(part)

        def products(weights, *out):
            def run(refs):
                scores, *outs = refs
                self.add_scores(scores, slot, keys)
                if weights is not None:
                    self.add_values(outs, weights, last, keys)
                plgpu.barrier_arrive(self.others_turn)

            nothing = plgpu.layout_cast(jnp.zeros((HALF, keys.size), jnp.float32), LAYOUT)
            return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in (nothing, *out))))

        plgpu.barrier_wait(held["k_here"].at[slot])
        if pending is None:
            return acc, products(None)[0]
        plgpu.barrier_wait(held["v_here"].at[last])
        plgpu.barrier_wait(self.turn)
        leave = lambda _, *out: (*products(None), *out)  # noqa: E731
        scores, *out = pending.unless_left_out(products, leave, pending.weights, *acc.out)
        plgpu.barrier_arrive(held["v_free"].at[last])
        return acc._replace(out=tuple(out)), scores

    def finish(self, part: Part, slot, acc: Accumulator, pending: Pending) -> Accumulator:
        """Adds the values of a slot that no later step adds. It has the turn then."""
        held = self.program.held
        plgpu.barrier_wait(held["v_here"].at[slot])
        plgpu.barrier_wait(self.turn)

        def add(weights, *out):
            run = lambda outs: self.add_values(outs, weights, slot, self.keys(part))  # noqa: E731
            return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in out)))

        out = pending.unless_left_out(add, lambda _, *out: out, pending.weights, *acc.out)
        plgpu.barrier_arrive(held["v_free"].at[slot])
        return acc._replace(out=tuple(out))

    def add_scores(self, scores, slot, keys) -> None:
        """Queries times keys, to an accumulator of the tensor cores."""
        held = self.program.held
        for chunk in range(self.program.chunks):
            plgpu.wgmma(scores, held["q"][1].at[self.number, chunk], _transposed(held["k"][1].at[slot, chunk, keys]))

    def add_values(self, outs, weights, slot, keys) -> None:
        """Weights times values, to accumulators of the tensor cores."""
        for chunk, out in enumerate(outs):
            plgpu.wgmma(out, weights, self.program.held["v"][1].at[slot, chunk, keys])

    def weigh(self, acc: Accumulator, scores, largest) -> tuple[Accumulator, Array]:
        """The softmax: an accumulator that lacks the values of these keys, and their weights."""
        top, total, decay, weights = self.softmax(acc.top, acc.total, scores, largest)
        weights = weights.astype(self.program.q.dtype)
        out, weights = lax.optimization_barrier((_scaled(acc.out, decay), weights))
        return Accumulator(top, total, out), weights

    def softmax(self, top, total, scores, largest=None) -> tuple[Array, ...]:
        """Top and total with these scores, what sums of before are multiplied by, and the scores' weights."""
        scale = self.program.scale
        largest = scores.max(axis=1) * scale if largest is None else largest
        new = jnp.maximum(top, largest)
        decay = jnp.exp2(top - new)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, [0]))
        total = total * decay + weights.sum(axis=1)
        return lax.optimization_barrier((new, total, decay, weights))

    def seen(self, part: Part, place, slot, half) -> Array:
        """Which of the keys each query sees, from the beginning of a half on: bool [64, keys]."""
        program, shape = self.program, (HALF, self.keys(part).size)
        if part.of_columns:
            row = plgpu.broadcasted_iota(jnp.float32, shape, 0, layout=LAYOUT)
            first = plgpu.load(program.held["first"].at[slot, self.number], *_ALL, layout=_COLUMNS, optimized=False)
            return row >= lax.broadcast_in_dim(first.astype(jnp.float32), shape, [1])
        row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=_ROWS)
        # Without the barrier the compiler keeps the columns' numbers in registers while the loop runs.
        column = lax.optimization_barrier(plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=_COLUMNS))
        column = lax.broadcast_in_dim(column, shape, [1])
        sequence, head, _ = program.place
        key = part.start(place, half)
        newest = row + (program.start + self.number * HALF - key)
        oldest = jnp.maximum(newest - program.inputs.windows[sequence, head] + 1, -key)
        newest, oldest = (lax.broadcast_in_dim(x, shape, [0]) for x in (newest, oldest))
        return (column <= newest) & (column >= oldest)

    def write(self, acc: Accumulator) -> None:
        """Writes output and lse, by way of the queries' shared memory."""
        program, (q_raw, q_tiled) = self.program, self.program.held["q"]
        sequence, head, _ = program.place
        window = program.inputs.windows[sequence, head]
        has_keys = acc.total != 0
        total = jnp.where(has_keys, acc.total, 1.0)
        row = plgpu.broadcasted_iota(jnp.int32, (HALF, CHUNK), 0, layout=LAYOUT)
        real = program.inputs.lengths[sequence, 1] - program.start - self.number * HALF
        is_real = row < jnp.where(window < 0, -1, real)
        nothing = jnp.where(window < 0, jnp.nan, 0.0)
        for chunk, out in enumerate(acc.out):
            out = jnp.where(is_real, out / lax.broadcast_in_dim(total, out.shape, [0]), nothing)
            q_tiled.at[self.number, chunk][...] = out.astype(program.q.dtype)
        lse = jnp.where(has_keys, acc.top * math.log(2) + jnp.log(total), -jnp.inf)
        program.lse.at[sequence, head, self.rows][...] = lse
        plgpu.commit_smem()
        for chunk in range(program.chunks):
            at = program.out.at[sequence, self.rows, head, program.head_dims(chunk)]
            plgpu.copy_smem_to_gmem(q_raw.at[self.number, chunk], at)
        plgpu.wait_smem_to_gmem(0)


def _scaled(out, factor) -> tuple[Array, ...]:
    return tuple(x * lax.broadcast_in_dim(factor, x.shape, [0]) for x in out)


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 12) else ref.transpose((1, 0))

"""Online softmax: attention accumulated over blocks of keys, one block at a time (Milakov and Gimelshein, 2018)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Accumulator(NamedTuple):
    """Attention over the keys seen so far, per query row R.

    Attributes:
      top: float32 [R], the largest score.
      total: float32 [R], the sum of exp(score - top).
      out: float32 [R, H], the sum of exp(score - top) * value.
    """

    top: Array
    total: Array
    out: Array


def start(num_rows: int, head_dim: int) -> Accumulator:
    """An accumulator that has seen no key. ``top`` is finite, so that exp(-inf - top) is 0 and not NaN."""
    return Accumulator(
        jnp.full((num_rows,), jnp.finfo(jnp.float32).min / 2),
        jnp.zeros((num_rows,), jnp.float32),
        jnp.zeros((num_rows, head_dim), jnp.float32),
    )


def valid_rows(v: Array, length: Array) -> Array:
    """v [S, ...] with zeros from row ``length`` on: a weight of zero does not hide a NaN in what padding holds."""
    index = jnp.arange(v.shape[0]).reshape(-1, *[1] * (v.ndim - 1))
    return jnp.where(index < length, v, 0)


def may_matter(scores: Array, top: Array, log_threshold: float) -> Array:
    """The rows that forbid to skip a tile: where exp(score - top) is not below a threshold, as it never is for NaN.

    Args:
      scores: float32 [R, W], -inf where a row does not see a key. top: float32 [R], each row's largest score so far.
      log_threshold: its logarithm, in the scores' units.

    Returns:
      int32 [R], 1 or 0. A maximum of the scores would not do: neither XLA on CPUs nor Triton keeps NaN in it.
    """
    return jnp.where(scores < (top + log_threshold)[:, None], 0, 1).max(axis=1)


def update(
    acc: Accumulator,
    q: Array,
    k: Array,
    v: Array,
    rows: Array,
    first_row: Array,
    end_row: Array,
    skip_threshold: float | None = None,
) -> Accumulator:
    """Adds a block of keys, each of which is seen by the rows first_row <= row < end_row.

    Args:
      acc: over R rows.
      q: float32 [R, H], already scaled. k, v: float32 [W, H].
      rows: int32 [R], the number of each query row. first_row, end_row: int32 [W].
      skip_threshold: a block is left out where exp(score - top) is below it for all pairs; None = none is.
    """
    scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision="highest")
    seen = (rows[:, None] >= first_row) & (rows[:, None] < end_row)
    scores = jnp.where(seen, scores, -jnp.inf)

    def add() -> Accumulator:
        top = jnp.maximum(acc.top, scores.max(axis=-1))
        weights = jnp.exp(scores - top[:, None])
        decay = jnp.exp(acc.top - top)
        return Accumulator(
            top,
            acc.total * decay + weights.sum(axis=-1),
            acc.out * decay[:, None] + lax.dot(weights, v, precision="highest"),
        )

    if skip_threshold is None:
        return add()
    return lax.cond(may_matter(scores, acc.top, math.log(skip_threshold)).max() > 0, add, lambda: acc)


def finish(acc: Accumulator) -> tuple[Array, Array]:
    """Output float32 [R, H] and lse float32 [R]; rows that saw no key give zeros and -inf."""
    seen = acc.total != 0
    out = jnp.where(seen[:, None], acc.out / jnp.where(seen, acc.total, 1.0)[:, None], 0.0)
    return out, jnp.where(seen, acc.top + jnp.log(jnp.where(seen, acc.total, 1.0)), -jnp.inf)

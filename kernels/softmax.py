"""Online softmax: attention accumulated over blocks of keys, one block at a time (Milakov and Gimelshein, 2018)."""

from __future__ import annotations

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


def update(
    acc: Accumulator, q: Array, k: Array, v: Array, rows: Array, first_row: Array, end_row: Array
) -> Accumulator:
    """Adds a block of keys, each of which is seen by the rows first_row <= row < end_row.

    Args:
      acc: over R rows.
      q: float32 [R, H], already scaled. k, v: float32 [W, H].
      rows: int32 [R], the number of each query row. first_row, end_row: int32 [W].
    """
    scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision="highest")
    seen = (rows[:, None] >= first_row) & (rows[:, None] < end_row)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(acc.top, scores.max(axis=-1))
    weights = jnp.exp(scores - top[:, None])
    decay = jnp.exp(acc.top - top)
    return Accumulator(
        top,
        acc.total * decay + weights.sum(axis=-1),
        acc.out * decay[:, None] + lax.dot(weights, v, precision="highest"),
    )


def finish(acc: Accumulator) -> tuple[Array, Array]:
    """Output float32 [R, H] and lse float32 [R]; rows that saw no key give zeros and -inf."""
    seen = acc.total != 0
    out = jnp.where(seen[:, None], acc.out / jnp.where(seen, acc.total, 1.0)[:, None], 0.0)
    return out, jnp.where(seen, acc.top + jnp.log(jnp.where(seen, acc.total, 1.0)), -jnp.inf)

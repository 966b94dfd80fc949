"""Static lengths of a layout's lists, and which patterns fit them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.estimate import MIN_VERTICALS, NUM_BLOCKS_UNIT
from minference_jax.patterns import HeadPattern, PatternArrays, PatternKind, uniform_patterns

_DEFAULT_NUM_BLOCKS = 128  # a block-sparse head may list so many before another program is compiled for more
_MOST_BLOCKS = 1 << 24  # a billion keys: more than any sequence has
_COLUMN_STEP = 256  # columns by which capacities grow


class Capacities(NamedTuple):
    """Static lengths of lists: blocks that a block-sparse head lists, and columns of any head, both 0 or more."""

    num_blocks: int
    num_columns: int


def capacities_for(num_blocks: int, num_columns: int) -> Capacities:
    """Capacities that hold what the largest heads ask for, in steps, so that similar patterns share a program."""
    num_blocks = min(num_blocks, _MOST_BLOCKS)
    blocks = max(_DEFAULT_NUM_BLOCKS, 1 << (num_blocks - 1).bit_length()) if num_blocks else 0
    return Capacities(blocks, -(-max(num_columns, 1) // _COLUMN_STEP) * _COLUMN_STEP)


def check_pattern(
    pattern: PatternArrays | HeadPattern,
    num_heads: int,
    kv_capacity: int,
    max_num_blocks: int | None,
    max_num_columns: int | None,
) -> tuple[PatternArrays, Capacities]:
    """Checks a pattern against the number of heads, and its sizes where they can be read; gives it with capacities."""
    for name, value in (("max_num_blocks", max_num_blocks), ("max_num_columns", max_num_columns)):
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    if not isinstance(pattern, PatternArrays):
        pattern = PatternArrays(*(x[0] for x in uniform_patterns(1, num_heads, pattern).arrays()))
    for name, x in pattern._asdict().items():
        if jnp.shape(x) != (num_heads,) or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise ValueError(
                f"pattern.{name} is {jnp.result_type(x)}{list(jnp.shape(x))}, it must be integers of shape "
                f"({num_heads},), one a head"
            )
    capacities = Capacities(_DEFAULT_NUM_BLOCKS, kv_capacity)
    known = None
    if not any(isinstance(x, jax.core.Tracer) for x in pattern):
        known = PatternArrays(*map(np.asarray, pattern))
        blocks = np.where(known.kind == PatternKind.BLOCK_SPARSE, known.num_blocks, 0).max()
        capacities = capacities_for(int(blocks), int(np.minimum(_num_columns(known), kv_capacity).max()))
    if max_num_blocks is not None:
        capacities = capacities._replace(num_blocks=max_num_blocks)
    if max_num_columns is not None:
        capacities = capacities._replace(num_columns=max_num_columns)
    capacities = capacities._replace(num_columns=min(capacities.num_columns, kv_capacity))
    if known is not None:
        for head in np.flatnonzero(~is_fit(known, capacities, kv_capacity))[:1]:
            given = ", ".join(f"{name}={x[head]}" for name, x in known._asdict().items())
            raise ValueError(
                f"head {head} of the pattern has {given}; it needs a code of PatternKind, positive sizes of that "
                f"kind, at most max_num_blocks={capacities.num_blocks} blocks and "
                f"max_num_columns={capacities.num_columns} verticals or sinks"
            )
    return PatternArrays(*(jnp.asarray(x, jnp.int32) for x in pattern)), capacities


def _num_columns(pattern: PatternArrays):
    """Columns that each head asks for, [N]; works on numpy arrays and traced ones."""
    kind, kinds = pattern.kind, PatternKind
    verticals = jnp.maximum if isinstance(kind, jax.Array) else np.maximum
    return (kind == kinds.VERTICAL_SLASH) * verticals(pattern.vertical_size, MIN_VERTICALS) + (
        kind == kinds.A_SHAPE
    ) * pattern.sink_size


def is_fit(pattern: PatternArrays, capacities: Capacities, kv_capacity: int):
    """Bool [N]: whether the kind and the sizes of each head can be honoured; works on numpy arrays and traced ones."""
    kind, kinds = pattern.kind, PatternKind
    has_room = (_num_columns(pattern) <= capacities.num_columns) | (capacities.num_columns >= kv_capacity)
    covers_all = capacities.num_blocks * NUM_BLOCKS_UNIT >= kv_capacity
    has_blocks = (pattern.num_blocks <= capacities.num_blocks) | covers_all
    return (
        ((kind == kinds.VERTICAL_SLASH) & (pattern.vertical_size > 0) & (pattern.slash_size > 0) & has_room)
        | ((kind == kinds.A_SHAPE) & (pattern.sink_size > 0) & (pattern.window_size > 0) & has_room)
        | ((kind == kinds.BLOCK_SPARSE) & (pattern.num_blocks > 0) & has_blocks)
        | (kind == kinds.DENSE)
    )

"""What the attention suite computes on: random or saved activations, and lists of a stated kind.

Random activations have no structure: an estimate on them finds scattered slashes that cover everything. So the kernel
gets constructed lists: a share of the slashes nearest, the other slashes and the verticals at random.
"""

from __future__ import annotations

import functools
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from minference_jax.bench.cases import Case
from minference_jax.estimate import FORCED_VERTICALS, MIN_VERTICALS, blocks_of, num_diagonals
from minference_jax.kernels.layouts import (
    FAR,
    SparseLayout,
    compact,
    costs_dense,
    density,
    everything,
    make_dense,
    slash_offsets,
    tile_starts,
)
from minference_jax.kernels.select_xla import top_k_mask
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import BlockSparse, VerticalSlash

_CHUNK = 4096  # tokens that are drawn at a time


class Activations(NamedTuple):
    """Queries, keys and values of one layer: q [1, T, N, H], k and v [1, T, K, H]."""

    q: Any
    k: Any
    v: Any


def random_activations(case: Case, length: int, seed: int = 0) -> Activations:
    """Standard normal arrays of the case's dtype, made on the device."""
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(length, count, case.head_dim) for count in heads]
    return Activations(*(normal(key, shape, case.dtype)[None] for key, shape in zip(keys, shapes, strict=True)))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Standard normal numbers of a shape, drawn some thousand rows of the first axis at a time, for memory."""
    steps = -(-shape[0] // _CHUNK)
    some = (-(-shape[0] // steps), *shape[1:])
    drawn = lax.map(lambda i: jax.random.normal(jax.random.fold_in(key, i), some).astype(dtype), jnp.arange(steps))
    return drawn.reshape(-1, *shape[1:])[: shape[0]]


def read_activations(path: Path) -> Activations:
    """Activations that benchmarks/save_activations.py wrote: a .npz file with q [T, N, H], k and v [T, K, H].

    Returns:
      numpy arrays, float16 or float32, with the leading axis of one sequence.

    Raises:
      ValueError: the file holds something else.
      OSError: it can't be read.
    """
    needed = f"{path} must be a .npz file with q [T, N, H], k and v [T, K, H]"
    try:
        file = np.load(path)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{needed}: {error}") from error
    names = getattr(file, "files", [])
    if not set(Activations._fields) <= set(names):
        raise ValueError(f"{needed}; it has {', '.join(names) or 'no named arrays'}")
    given = Activations(*(file[name] for name in Activations._fields))
    shapes = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in given._asdict().items())
    q, k, v = given
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{needed}; it has {shapes}")
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"{needed}, N a multiple of K; it has {shapes}")
    if {str(x.dtype) for x in given} - {"float16", "float32"}:
        raise ValueError(f"{needed}, float16 or float32; it has {shapes}")
    return Activations(*(x[None] for x in given))


def saved_activations(saved: Activations, length: int, dtype: str) -> Activations:
    """The first ``length`` tokens of saved activations, on the device.

    Raises:
      ValueError: there are not so many.
    """
    if length > saved.q.shape[1]:
        raise ValueError(f"the saved activations have {saved.q.shape[1]} tokens, {length} were asked for")
    return Activations(*(jnp.asarray(x[:, :length], dtype) for x in saved))


def constructed_layout(case: Case, length: int, tiles: TileConfig, num_columns: int, seed: int = 0) -> SparseLayout:
    """Lists of the case's kind for one sequence: [1, N, ...].

    Args:
      case: vertical-slash, block-sparse or dense.
      length: tokens; sizes above it count as it.
      tiles: tile sizes.
      num_columns: capacity of the verticals.
      seed: of what is scattered.
    """
    sizes = case.sizes_at(length, tiles)
    none = everything(1, case.num_heads, length, length, tiles)
    if isinstance(sizes.pattern, VerticalSlash):
        rng = np.random.default_rng(seed)
        columns, count = _columns(sizes.pattern, case.num_heads, length, num_columns, rng)
        offsets, offset_counts = _offsets(case, sizes.local_share, sizes.pattern.slash_size, length, tiles, rng)
        return none._replace(
            offsets=offsets,
            offset_counts=offset_counts,
            columns=columns,
            column_counts=jnp.full_like(none.column_counts, count),
        )
    if isinstance(sizes.pattern, BlockSparse):
        nothing = {"offsets": jnp.full_like(none.offsets, -FAR), "offset_counts": jnp.zeros_like(none.offset_counts)}
        ids, counts = _random_blocks(jax.random.key(seed), case.num_heads, length, sizes.pattern.num_blocks, tiles)
        return none._replace(**nothing, block_ids=ids[None], block_counts=counts[None])
    return none


@functools.partial(jax.jit, static_argnums=(1, 2))
def dense_where_cheaper(layout: SparseLayout, length: int, tiles: TileConfig) -> SparseLayout:
    """A vertical-slash layout with those heads dense that would cost as much, as the library's own layouts are.

    Args:
      layout: [1, N, ...], built for ``tiles``. length: tokens.
    """
    return make_dense(layout, costs_dense(density_of(layout, length, tiles)), length, tiles)


@functools.partial(jax.jit, static_argnums=(1, 2))
def density_of(layout: SparseLayout, length: int, tiles: TileConfig) -> Array:
    """Each head's share of the work of dense attention over a whole prompt of ``length`` tokens: float32 [1, N]."""
    return density(layout, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), length, tiles)


def _columns(pattern: VerticalSlash, num_heads: int, length: int, capacity: int, rng) -> tuple[Array, int]:
    """The first keys and others at random, int32 [1, N, capacity], and how many."""
    count = min(max(pattern.vertical_size, MIN_VERTICALS), length)
    first = min(FORCED_VERTICALS, count)
    columns = np.full((1, num_heads, min(capacity, length)), FAR, np.int32)
    columns[..., :first] = np.arange(first)
    for head in columns[0]:
        head[first:count] = first + np.sort(rng.choice(length - first, count - first, replace=False))
    return jnp.asarray(columns), count


def _offsets(case: Case, share: float, wanted: int, length: int, tiles: TileConfig, rng) -> tuple[Array, Array]:
    """The slash blocks of the nearest slashes, or block diagonals, and of others at random: [1, N, C] and [1, N]."""
    is_block = case.slash_granularity == "block"
    size = num_diagonals(length, tiles.block_kv) if is_block else length
    count = min(blocks_of(wanted, tiles.block_kv) if is_block else wanted, size)
    local = count - math.ceil(round((1 - share) * count, 6))
    scattered = [local + rng.choice(size - local, count - local, replace=False) for _ in range(case.num_heads)]
    rows = np.arange(case.num_heads)[:, None]
    kept = jnp.zeros((case.num_heads, size), bool).at[:, :local].set(True)
    kept = kept.at[rows, np.asarray(scattered, np.int32).reshape(case.num_heads, -1)].set(True)[None]
    return jax.jit(slash_offsets, static_argnums=(1, 2))(kept, tiles, is_block)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random_blocks(key: Array, num_heads: int, length: int, num_blocks: int, tiles: TileConfig) -> tuple[Array, Array]:
    """A list for every query tile, its own blocks among them: int32 [N, Tq, C], and counts int32 [N, Tq]."""
    (starts,) = tile_starts(jnp.zeros(1, jnp.int32), length, tiles)
    blocks = jnp.arange(-(-length // tiles.block_kv), dtype=jnp.int32)
    capacity = min(max(num_blocks, tiles.block_q // tiles.block_kv + 1), blocks.size)
    first, end = starts[:, None], jnp.minimum(starts + tiles.block_q, length)[:, None]
    visible = blocks * tiles.block_kv < end
    own = visible & (blocks >= first // tiles.block_kv)
    wanted = jnp.minimum(jnp.maximum(num_blocks, own.sum(axis=-1)), visible.sum(axis=-1)).astype(jnp.int32)

    def head(key):
        scores = jax.random.uniform(key, visible.shape)
        return compact(top_k_mask(jnp.where(visible, jnp.where(own, jnp.inf, scores), -jnp.inf), wanted), capacity)

    ids = lax.map(head, jax.random.split(key, num_heads))
    return ids, jnp.broadcast_to(wanted, (num_heads, wanted.size))

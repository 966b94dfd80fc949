"""What patterns make of each head of one layer: outputs, their error, their cost. All of it by `sparse_attention`.

The call that a prefill makes is the call that is made here, so that what is found offline is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from minference_jax.analysis.activations import LayerActivations
from minference_jax.attention import sparse_attention
from minference_jax.capacities import Capacities
from minference_jax.estimate import LAST_Q, MIN_VERTICALS, NUM_BLOCKS_UNIT
from minference_jax.generate import LanguageModel
from minference_jax.implementations import device_of, named
from minference_jax.index import SlashGranularity, build_layout
from minference_jax.kernels.layouts import SparseLayout
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import PatternArrays, PatternKind

_LEAST_CAPACITY = 256


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """How sparse attention runs, beside its patterns; hashable, so that it can be static.

    Attributes:
        slash_granularity: "line" or "block", as in `sparse_attention`.
        implementation: name of the one that runs.
        tiles: its tile sizes.
        capacities: of a layout's lists; None = what a layer's patterns need, in powers of four.
    """

    slash_granularity: SlashGranularity
    implementation: str
    tiles: TileConfig
    capacities: Capacities | None = None


def settings_for(
    model: LanguageModel, *, slash_granularity: SlashGranularity = "line", implementation: str | None = None
) -> SparseSettings:
    """The settings with which the model's prefill runs sparse attention where its weights are.

    Args:
        model: its device, dtype and measured tiles count.
        slash_granularity: "line" or "block".
        implementation: None = the first that can.

    Raises:
        ValueError: an unknown granularity or implementation.
        NotImplementedError: the named implementation can't run there.
    """
    if slash_granularity not in get_args(SlashGranularity):
        raise ValueError(f'{slash_granularity=} must be "line" or "block"')
    entry, tiles = model.sparse_on_device(implementation)
    if tiles is None:
        decoder = model.model
        device = device_of(decoder.embed.embedding[...])
        tiles = entry.tiles(device, model.config.head_dim, decoder.dtype.itemsize)
    return SparseSettings(slash_granularity=slash_granularity, implementation=entry.name, tiles=tiles)


def capacities_of(pattern: PatternArrays, size: int) -> Capacities:
    """Capacities for patterns on `size` keys, in powers of four, so that a search compiles few programs."""
    kind = np.asarray(pattern.kind)
    verticals = np.where(kind == PatternKind.VERTICAL_SLASH, np.maximum(pattern.vertical_size, MIN_VERTICALS), 0)
    columns = np.maximum(verticals, np.where(kind == PatternKind.A_SHAPE, pattern.sink_size, 0))
    blocks = np.where(kind == PatternKind.BLOCK_SPARSE, pattern.num_blocks, 0)
    most = -(-size // NUM_BLOCKS_UNIT)
    return Capacities(_power_of_four(int(blocks.max()), most), _power_of_four(int(columns.max()), size))


def _power_of_four(count: int, most: int) -> int:
    if count == 0:
        return 0
    capacity = _LEAST_CAPACITY
    while capacity < count:
        capacity *= 4
    return min(capacity, most)


def sparse_outputs(
    layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings
) -> tuple[Array, Array, Array]:
    """Sparse attention of one layer.

    Args:
        layer: its activations.
        pattern: numpy int32 [N], one entry per query head.
        settings: how to run.

    Returns:
        out [1, T, N, H], lse float32 [1, T, N] over the kept keys, and density float32 [N], each head's share of the
        work of dense attention, counted in tiles that are really computed.

    Raises:
        ValueError, NotImplementedError, MemoryError: as `sparse_attention`.
    """
    results = sparse_attention(
        layer.q, layer.k, layer.v, pattern, kv_len=layer.kv_len, return_lse=True, **_options(layer, pattern, settings)
    )
    return results[0], results[1], results[2][0]


def head_densities(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> Array:
    """The density float32 [N] of `sparse_outputs`, whose attention the compiler leaves out: only the index is built.

    Args: as `sparse_outputs`. Raises: as `sparse_outputs`.
    """
    options = tuple(_options(layer, pattern, settings).items())
    return _densities(layer.q, layer.k, layer.v, pattern, layer.kv_len, options=options)


def _capacities(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> Capacities:
    return settings.capacities or capacities_of(pattern, layer.k.shape[1])


def _options(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> dict[str, Any]:
    capacities = _capacities(layer, pattern, settings)
    return {
        "return_density": True,
        "slash_granularity": settings.slash_granularity,
        "implementation": settings.implementation,
        "tiles": settings.tiles,
        "max_num_blocks": capacities.num_blocks,
        "max_num_columns": capacities.num_columns,
    }


@partial(jax.jit, static_argnames="options")
def _densities(q, k, v, pattern, kv_len, *, options) -> Array:
    return sparse_attention(q, k, v, pattern, kv_len=kv_len, **dict(options))[1][0]


def head_layouts(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> SparseLayout:
    """What `sparse_outputs` computes, as the layout of one sequence and N heads.

    Args: as `sparse_outputs`. Raises: nothing of its own.
    """
    return _layouts(layer.q, layer.k, pattern, layer.kv_len, settings, _capacities(layer, pattern, settings))


@partial(jax.jit, static_argnames=("settings", "capacities"))
def _layouts(q, k, pattern, kv_len, settings, capacities) -> SparseLayout:
    (entry,) = named(settings.implementation)
    return build_layout(
        q,
        k,
        pattern,
        scale=q.shape[3] ** -0.5,
        kv_len=kv_len,
        q_offset=jnp.zeros_like(kv_len),
        tiles=settings.tiles,
        max_num_blocks=capacities.num_blocks,
        max_num_columns=capacities.num_columns,
        slash_granularity=settings.slash_granularity,
        kernels=entry.estimate,
    )


@partial(jax.jit, static_argnames="last_share")
def head_errors(out: Array, dense: Array, kv_len: Array, *, last_share: float = 0.0) -> tuple[Array, Array]:
    """Squared error of each head's output, and the square of what it should be: float32 [N] each.

    Mean over the queries, weighted, of the sum over head_dim.

    Args:
        out, dense: [1, T, N, H], of sparse and of dense attention.
        kv_len: int32 [1]; rows beyond do not count.
        last_share: share of the weight, from 0 to 1, that the last `LAST_Q` queries have; all share the rest evenly.

    Raises:
        ValueError: last_share is below 0 or above 1.
    """
    if not 0 <= last_share <= 1:
        raise ValueError(f"{last_share=} must be from 0 to 1, a share of the weight")
    place, length = jnp.arange(out.shape[1]), kv_len[:, None]
    is_last = place >= length - LAST_Q
    weight = (1 - last_share) / length + is_last * last_share / jnp.minimum(length, LAST_Q)
    weight = jnp.where(place < length, weight, 0.0)[..., None, None]
    real = weight > 0
    out, dense = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (out, dense))
    wrong, whole = jnp.square(out - dense), jnp.square(dense)
    return (weight * wrong).sum(axis=(0, 1, 3)), (weight * whole).sum(axis=(0, 1, 3))

"""What patterns keep on a prompt, measured at every head against dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from minference_jax.analysis import (
    LayerActivations,
    SparseSettings,
    head_errors,
    head_layouts,
    read_layers,
    settings_for,
    sparse_outputs,
)
from minference_jax.analysis.timing import dense_milliseconds, head_milliseconds, sparse_milliseconds
from minference_jax.capacities import capacities_for
from minference_jax.generate import LanguageModel
from minference_jax.generate.prompts import Tokens
from minference_jax.index import SlashGranularity
from minference_jax.inspection.maps import HeadMap, head_map
from minference_jax.inspection.passages import Passages, read_passages
from minference_jax.patterns import HeadPattern, ModelPatterns, PatternArrays, uniform_patterns


class Inspection(NamedTuple):
    """What patterns keep on one prompt; L layers of N heads.

    Attributes:
        patterns: of every head.
        mass: float32 [L, N], share of dense attention's mass that falls on kept keys, mean over the queries.
        error: float32 [L, N], norm of the output's difference from dense attention over the norm of dense attention's;
            every query counts alike, other than in the errors of a search.
        density: float32 [L, N], share of dense attention's work, in tiles that are really computed.
        head_ms: float64 [L, N], expected milliseconds of each head, index included; None where not measured.
        sparse_ms, dense_ms: float64 [L], measured milliseconds of a layer's attention; None where not measured.
        passages: what the last queries read.
        maps: those that were asked for, by layer and head.
    """

    patterns: ModelPatterns
    mass: np.ndarray
    error: np.ndarray
    density: np.ndarray
    head_ms: np.ndarray | None
    sparse_ms: np.ndarray | None
    dense_ms: np.ndarray | None
    passages: Passages
    maps: dict[tuple[int, int], HeadMap]


def inspect_attention(
    model: LanguageModel,
    prompt: Tokens,
    *,
    pattern: HeadPattern | ModelPatterns | None = None,
    slash_granularity: SlashGranularity = "line",
    implementation: str | None = None,
    passage_size: int = 64,
    maps: Sequence[tuple[int, int]] = (),
    map_pixels: int = 512,
    measure_time: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Inspection:
    """Compares what each head computes with dense attention: mass, output, cost, and passages that are not read.

    Every layer reads what dense attention gives in the layers below, so that each head's loss is its own. Index and
    attention are those of a prefill. Memory is linear in the prompt: one layer's activations, no queries by keys.

    Args:
        model: with its weights.
        prompt: token ids.
        pattern: of all heads, or of each; None = the model's own patterns.
        slash_granularity: "line" or "block".
        implementation: of sparse attention; None = the first that can.
        passage_size: tokens.
        maps: (layer, head) pairs whose attention maps are to be computed.
        map_pixels: most pixels along a side of a map.
        measure_time: whether to time each head and layer on this device.
        progress: called as (layers done, layers in all, what comes next).

    Raises:
        ValueError: a prompt, patterns, sizes, layers or heads that do not fit the model.
        NotImplementedError: the named implementation can't do the call.
        MemoryError: the device has too little.
    """
    shape = model.config.num_layers, model.config.num_heads
    patterns = _patterns(model, pattern)
    patterns.check_granularity(slash_granularity)
    for name, value in (("passage_size", passage_size), ("map_pixels", map_pixels)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for place in maps:
        if not (0 <= place[0] < shape[0] and 0 <= place[1] < shape[1]):
            raise ValueError(
                f"layer {place[0]}, head {place[1]} is not in a model of {shape[0]} layers of {shape[1]} heads"
            )
    settings = settings_for(model, slash_granularity=slash_granularity, implementation=implementation)
    settings = replace(settings, capacities=capacities_for(patterns.max_num_blocks, patterns.max_num_columns))
    for_both = None if implementation is None else settings.implementation
    arrays, figures, passages, times, found = patterns.arrays(), [], [], [], {}
    for index, held in enumerate(read_layers(model, [prompt], implementation=for_both, return_lse=True)):
        layer = held.pop()
        if progress is not None:
            progress(index, shape[0], f"layer {index}")
        own = PatternArrays(*(x[index] for x in arrays))
        layout = head_layouts(layer, own, settings)
        figures.append(_figures(layer, own, settings))
        passages.append(read_passages(layer, layout, passage_size=passage_size, tiles=settings.tiles))
        if measure_time:
            times.append(_times(layer, own, settings, for_both))
        for place in maps:
            if place[0] == index:
                found[place] = head_map(layer, layout, *place, pixels=map_pixels, tiles=settings.tiles)
        del layer, layout  # else they would lie beside those of the next layer
    if progress is not None:
        progress(shape[0], shape[0], "done")
    mass, error, density = _columns(figures)
    head_ms, sparse_ms, dense_ms = _columns(times) if measure_time else (None, None, None)
    read = Passages(passage_size, len(prompt), *_columns(passages))
    return Inspection(patterns, mass, error, density, head_ms, sparse_ms, dense_ms, read, found)


def _columns(rows: list[tuple[Any, Any, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each layer's three figures as three arrays [L, ...]."""
    first, second, third = (np.array(column) for column in zip(*rows, strict=True))
    return first, second, third


def _patterns(model: LanguageModel, pattern: HeadPattern | ModelPatterns | None) -> ModelPatterns:
    shape = model.config.num_layers, model.config.num_heads
    if isinstance(pattern, get_args(HeadPattern)):
        return uniform_patterns(*shape, pattern)
    if not isinstance(pattern, ModelPatterns | None):
        raise ValueError(f"{pattern=} must be a head pattern, ModelPatterns or None")
    patterns = model.patterns if pattern is None else pattern
    patterns.check(*shape)
    return patterns


def _figures(
    layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mass, error and density of every head [N]."""
    out, lse, density = sparse_outputs(layer, pattern, settings)
    wrong, whole = (np.asarray(x) for x in head_errors(out, layer.out, layer.kv_len))
    error = np.sqrt(wrong / np.where(whole > 0, whole, 1.0))
    return np.asarray(_mass(lse, layer.lse, layer.kv_len)), error, np.asarray(density)


@jax.jit
def _mass(sparse_lse: Array, dense_lse: Array, kv_len: Array) -> Array:
    """Mean over the queries of the mass on kept keys: the sum of exponentials over them, over that of all keys."""
    real = (jnp.arange(sparse_lse.shape[1]) < kv_len[:, None])[..., None]
    kept = jnp.where(real, jnp.exp(sparse_lse - jnp.where(real, dense_lse, 0.0)), 0.0)
    return kept.sum(axis=(0, 1)) / kv_len.sum()


def _times(
    layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings, implementation: str | None
) -> tuple[np.ndarray, float, float]:
    """Of every head [N], of the layer, and of the layer with dense attention."""
    sparse = head_milliseconds(layer, pattern, settings), sparse_milliseconds(layer, pattern, settings)
    return *sparse, dense_milliseconds(layer, implementation)

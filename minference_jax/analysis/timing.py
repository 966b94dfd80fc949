"""Measured time of dense and sparse attention on this device, of a layer and of each of its heads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.analysis.activations import LayerActivations
from minference_jax.analysis.heads import SparseSettings, sparse_outputs
from minference_jax.attention import dense_attention
from minference_jax.patterns import PatternArrays

REPEATS = 3
"""Timed calls, after one that warms up; the median counts."""


def milliseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time of a call until its arrays are there; it is called once more before, to compile and to warm up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def dense_milliseconds(layer: LayerActivations, implementation: str | None = None) -> float:
    """Time of dense attention of all heads of a layer.

    Args:
        layer: its activations.
        implementation: None = the first that can.

    Raises:
        NotImplementedError: the named implementation can't do it.
    """
    q, k, v, kv_len = layer.q, layer.k, layer.v, layer.kv_len
    return milliseconds(lambda: dense_attention(q, k, v, kv_len=kv_len, implementation=implementation))


def sparse_milliseconds(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> float:
    """Time of sparse attention of all heads of a layer, estimate and layout included.

    Args:
        layer: its activations.
        pattern: numpy int32 [N].
        settings: how to run.

    Raises:
        ValueError, NotImplementedError, MemoryError: as `sparse_attention`.
    """
    return milliseconds(lambda: sparse_outputs(layer, pattern, settings))


def head_milliseconds(layer: LayerActivations, pattern: PatternArrays, settings: SparseSettings) -> np.ndarray:
    """Expected time of each head, estimate and layout included: float64 [N].

    A GPU runs the heads of a layer side by side, so a head is measured as a layer of N of its kind, and its time is
    an Nth of that. The pure JAX kernel runs them one after another: there it is measured alone.

    Args:
        layer: its activations.
        pattern: numpy int32 [N].
        settings: how to run.

    Raises:
        ValueError, NotImplementedError, MemoryError: as `sparse_attention`.
    """
    num_heads, num_kv_heads = layer.q.shape[2], layer.k.shape[2]
    copies, kv_copies = (1, 1) if settings.implementation == "xla" else (num_heads, num_kv_heads)
    times = []
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        alone = layer._replace(
            q=jnp.repeat(layer.q[:, :, head : head + 1], copies, axis=2),
            k=jnp.repeat(layer.k[:, :, kv_head : kv_head + 1], kv_copies, axis=2),
            v=jnp.repeat(layer.v[:, :, kv_head : kv_head + 1], kv_copies, axis=2),
        )
        own = PatternArrays(*(np.repeat(x[head : head + 1], copies) for x in pattern))
        times.append(sparse_milliseconds(alone, own, settings) / copies)
    return np.array(times)

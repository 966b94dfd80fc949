"""Prefill in chunks: a long prompt is read part by part into one cache, so that activations take a chunk's memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minference_jax.cache import AnyPolicy, Plain, Quantised
from minference_jax.generate.programs import PrefillResult
from minference_jax.models import Attend
from minference_jax.patterns import PatternArrays

_PLAIN = Plain()
_UNIT = 128  # tokens: chunks hold whole tiles of queries


def check_chunks(chunk_size: int | None, policy: AnyPolicy) -> None:
    """Refuses, with ValueError, what is neither None nor a positive multiple of 128, and policies for whole prompts."""
    if chunk_size is None:
        return
    is_integer = isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool)
    if not is_integer or chunk_size < _UNIT or chunk_size % _UNIT:
        raise ValueError(f"{chunk_size=} must be None or a multiple of {_UNIT} tokens, at least {_UNIT}")
    if not isinstance(policy, Plain | Quantised):
        raise ValueError(
            f"a prefill in chunks takes kv_cache='plain', 'int8' or 'fp8'; {policy.name!r} is for prompts read at once"
        )


def prefill_in_chunks(
    graph: Any,
    state: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    patterns: PatternArrays | None,
    attend: Attend,
    chunk_size: int,
    policy: Plain | Quantised = _PLAIN,
) -> PrefillResult:
    """Reads prompts chunk by chunk; one program serves every chunk of every prompt of the bucket.

    Each chunk attends to all tokens before it, as the cache holds them, and to its own as they are. What a sparse head
    keeps is estimated from the chunk's own last queries. A row that ends before a chunk takes no part in it. A last
    chunk is padded to a whole one.

    Args:
        graph, state: of a model.
        tokens: int32 [B, T], padded to a bucket.
        lengths: int32 [B], true lengths.
        patterns: [L, N], or None for dense attention.
        attend: how to attend; it must honour q_offset.
        chunk_size: tokens of a chunk.
        policy: what the cache holds.
    """
    capacity = capacity_of(tokens.shape[1], chunk_size)
    padded = np.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
    read = _nothing_read(graph, state, len(tokens), capacity, policy, is_sparse=patterns is not None)
    leaf = jax.tree.leaves(state)[0]
    if leaf.committed:  # as what each chunk makes is: else the first would have a program of its own
        read = jax.device_put(read, leaf.sharding)
    for start in range(0, int(lengths.max()), chunk_size):
        counts = np.clip(lengths - start, 0, chunk_size).astype(np.int32)
        chunk = padded[:, start : start + chunk_size]
        read = _read_chunk(graph, state, chunk, counts, _share(lengths, start, counts), lengths, patterns, read, attend)
    return read


def capacity_of(bucket: int, chunk_size: int | None) -> int:
    """Tokens that the cache of a prefill has room for: whole chunks, or the bucket where there are none."""
    return bucket if chunk_size is None else -(-bucket // chunk_size) * chunk_size


def shapes_of_read(
    graph: Any, state: Any, batch: int, bucket: int, chunk_size: int, policy: Plain | Quantised, *, is_sparse: bool
) -> PrefillResult:
    """Shapes of what `prefill_in_chunks` hands from chunk to chunk."""
    sizes = (batch, capacity_of(bucket, chunk_size), policy)
    return jax.eval_shape(lambda state: _nothing_read(graph, state, *sizes, is_sparse=is_sparse), state)


def lower_chunk(
    graph: Any, state: Any, patterns: PatternArrays | None, read: PrefillResult, attend: Attend, chunk_size: int
) -> Any:
    """The program of `prefill_in_chunks`, not yet compiled; `read` as `shapes_of_read`, other arguments as there."""
    batch = read.logits.shape[0]
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens, share = jax.ShapeDtypeStruct((batch, chunk_size), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    return _read_chunk.lower(graph, state, tokens, rows, share, rows, patterns, read, attend)


def _share(lengths: np.ndarray, start: int, counts: np.ndarray) -> np.ndarray:
    """The share of each row's pairs of query and earlier key that lies in a chunk: float32 [B], 0 where it has none."""

    def pairs(n: np.ndarray) -> np.ndarray:  # of the first n tokens, twice
        return n.astype(np.float64) * (n + 1.0)

    first = np.minimum(lengths, start)
    return ((pairs(first + counts) - pairs(first)) / pairs(lengths)).astype(np.float32)


@partial(jax.jit, static_argnames=("graph", "batch", "capacity", "policy", "is_sparse"))
def _nothing_read(
    graph: Any, state: Any, batch: int, capacity: int, policy: Plain | Quantised, *, is_sparse: bool
) -> PrefillResult:
    model = nnx.merge(graph, state)
    config = model.config
    cache = policy.empty(config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim, model.dtype)
    density = jnp.zeros((config.num_layers, batch, config.num_heads), jnp.float32) if is_sparse else None
    return PrefillResult(jnp.zeros((batch, config.vocab_size), jnp.float32), cache, density)


@partial(jax.jit, static_argnames=("graph", "attend"), donate_argnames="read")
def _read_chunk(
    graph: Any,
    state: Any,
    tokens: jax.Array,
    counts: jax.Array,
    share: jax.Array,
    lengths: jax.Array,
    patterns: PatternArrays | None,
    read: PrefillResult,
    attend: Attend,
) -> PrefillResult:
    """`read`, which is donated, with one more chunk: tokens [B, C], of which `counts` [B] are true; `share` [B] is the
    chunk's part of dense attention's work, `lengths` [B] those of the whole prompts. Its start is that of the cache."""
    model = nnx.merge(graph, state)
    how: dict[str, Any] = {"attend": attend, "layer_inputs": patterns, "rope_lengths": lengths}
    logits, cache, density = model(tokens, read.cache, lengths=counts, **how)
    logits = jnp.where((counts > 0)[:, None], logits, read.logits)
    if read.density is None:
        return PrefillResult(logits, cache, None)
    return PrefillResult(logits, cache, read.density + share[:, None] * density)

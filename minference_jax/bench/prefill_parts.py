"""The parts of a prefill timed alone, on the very arrays that each layer of it computes on.

A prompt is read layer by layer as a prefill reads it: what attention gives in one layer goes into the next, lists are
estimated from each layer's own queries and keys. The steps between the timed parts are not timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from minference_jax import estimate
from minference_jax.bench.constructed import ConstructedAttend
from minference_jax.cache import AnyPolicy, Host, KVCache, Plain, QuantisedKV
from minference_jax.cache.host import to_host
from minference_jax.capacities import Capacities
from minference_jax.generate import LanguageModel
from minference_jax.generate.attend import SparseAttend
from minference_jax.generate.prompts import pad_prompts
from minference_jax.implementations import Implementation, device_of, first_sparse, memory_for
from minference_jax.index import SlashGranularity, build_layout
from minference_jax.kernels.layouts import SparseLayout
from minference_jax.kernels.tiles import TileConfig
from minference_jax.models import Attend
from minference_jax.patterns import PatternArrays, PatternKind

PARTS = ("cache", "mass", "index", "kernel")
"""Keeping keys and values as the cache policy does; attention mass, the first part of the estimate; estimate and
layout, the mass among it; attention itself."""

_PLAIN = Plain()


class _Sparse(NamedTuple):
    """How sparse attention runs, static; see `build_layout`."""

    entry: Implementation
    tiles: TileConfig
    capacities: Capacities
    slash_granularity: SlashGranularity


def time_parts(
    model: LanguageModel,
    tokens: np.ndarray,
    attend: Attend,
    patterns: PatternArrays | None,
    chunk_size: int | None = None,
    policy: AnyPolicy = _PLAIN,
) -> dict[str, float | None]:
    """Milliseconds of each of `PARTS`, summed over all layers, and all chunks, of one call each.

    Args:
      model: reads.
      tokens: ids of one prompt.
      attend: how, from `choose_attend`, of an implementation that can do it.
      patterns: numpy int32 [L, N]; None where attention is dense.
      chunk_size: tokens read at a time; None = all.
      policy: of the cache. With `Host` its part is the copies alone, which a prefill hides behind its other work.

    Returns:
      None for parts that there are not: "mass" where no head is vertical-slash, "mass" and "index" where attention is
      dense.

    Raises:
      NotImplementedError: the implementation can't do it.
      MemoryError: the device has too little.
    """
    with memory_for(f"the parts of a prefill of {len(tokens)} tokens, one after another,"):
        return _Walk(model, tokens, attend, patterns, chunk_size, policy).times()


class _Walk:
    """One prompt read layer by layer."""

    def __init__(self, model, tokens, attend, patterns, chunk_size, policy):
        self._policy = policy
        self._graph, self._state = nnx.split(model.model)
        self._attend, self._patterns, self._config = attend, patterns, model.config
        self._dtype, self._scale = model.model.dtype, model.config.head_dim**-0.5
        padded, self._lengths = pad_prompts(
            [tokens], vocab_size=model.config.vocab_size, max_length=model.config.max_length
        )
        self._chunk = padded.shape[1] if chunk_size is None or len(tokens) <= chunk_size else chunk_size
        self._tokens = np.pad(padded, ((0, 0), (0, -padded.shape[1] % self._chunk)))
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._is_warm = False
        self._held: Any = None

    def times(self) -> dict[str, float | None]:
        """Reads; gives the sums."""
        for start in range(0, int(self._lengths[0]), self._chunk):
            x = _embed(self._graph, self._state, self._tokens[:, start : start + self._chunk])
            counts = np.minimum(self._lengths - start, self._chunk).astype(np.int32)
            for layer in range(self._config.num_layers):
                x = self._layer(np.int32(layer), x, np.full(1, start, np.int32), counts)
        absent: tuple[str, ...] = ()
        if self._patterns is None:
            absent = ("mass", "index")
        elif not (np.asarray(self._patterns.kind) == PatternKind.VERTICAL_SLASH).any():
            absent = ("mass",)
        return {part: None if part in absent else 1e3 * seconds for part, seconds in self._sums.items()}

    def _layer(self, index: np.int32, x: Array, start: np.ndarray, counts: np.ndarray) -> Array:
        """Hidden states behind one layer."""
        where = {"start": start, "counts": counts, "rope_lengths": self._lengths}
        qkv = jax.block_until_ready(_project(self._graph, self._state, index, x, **where))
        q, (k, v) = qkv[0], self._keep(index, start, *qkv)
        del qkv
        out = self._attention(int(index), q, k, v, {"q_offset": start, "kv_len": start + counts})
        self._is_warm = True
        del q, k, v
        return jax.block_until_ready(_finish(self._graph, self._state, index, x, out, **where))

    def _keep(self, index: np.int32, start: np.ndarray, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """Keeps a layer's keys and values; gives those that its queries attend to."""
        if self._chunk < self._tokens.shape[1]:
            return self._timed("cache", lambda: self._append(index, start, k, v))
        is_on_host = isinstance(self._policy, Host)
        self._timed("cache", lambda: (to_host(k), to_host(v)) if is_on_host else self._write(index, q, k, v))
        return k, v

    def _append(self, index: np.int32, start: np.ndarray, k: Array, v: Array) -> tuple[Array, Array]:
        if self._held is None:
            config = self._config
            sizes = (config.num_layers, 1, self._tokens.shape[1], config.num_kv_heads, config.head_dim, self._dtype)
            self._held = self._placed(self._policy.empty(*sizes))
        self._held, *every = _append(self._held, index, start, k, v)
        return tuple(every)

    def _write(self, index: np.int32, q: Array, k: Array, v: Array) -> Any:
        layers = self._config.num_layers
        how = {"num_layers": layers, "scale": self._scale}
        if self._held is None:
            keep = functools.partial(self._policy.keep, **how)
            one = jax.eval_shape(keep, q, k, v, lengths=self._lengths, layer=index)
            self._held = self._placed(jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one))
        self._held = _write(self._held, index, q, k, v, self._lengths, policy=self._policy, **how)
        return self._held

    def _placed(self, held: Any) -> Any:
        """Where each write leaves it: else the first that is timed would compile another program."""
        leaf = jax.tree.leaves(self._state)[0]
        return jax.device_put(held, leaf.sharding) if leaf.committed else held

    def _attention(self, layer: int, q: Array, k: Array, v: Array, where: dict[str, np.ndarray]) -> Array:
        if self._patterns is None:
            return self._timed("kernel", lambda: _dense(q, k, v, **where, attend=self._attend, scale=self._scale))
        pattern = PatternArrays(*(x[layer] for x in self._patterns))
        how = {**where, "scale": self._scale, "how": _how(self._attend, q, k)}
        self._timed("mass", lambda: _mass(q, k, pattern, **how))
        layout = self._timed("index", lambda: _index(q, k, pattern, **how))
        return self._timed("kernel", lambda: _kernel(q, k, v, layout, **how))

    def _timed(self, part: str, call: Callable[[], Any]) -> Any:
        if not self._is_warm:
            jax.block_until_ready(call())
        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        self._sums[part] += time.perf_counter() - begin
        return result


def _how(attend: SparseAttend, q: Array, k: Array) -> _Sparse:
    where = (device_of(q), q.shape[3], q.dtype.itemsize)
    entry = attend.entry(q) if isinstance(attend, ConstructedAttend) else first_sparse(attend.implementation, *where)
    columns = min(attend.capacities.num_columns, k.shape[1])
    capacities = attend.capacities._replace(num_columns=columns)
    return _Sparse(entry, attend.tiles or entry.tiles(*where), capacities, attend.slash_granularity)


@functools.partial(jax.jit, static_argnames="graph")
def _embed(graph: Any, state: Any, tokens: Array) -> Array:
    return nnx.merge(graph, state).embed(tokens)


@functools.partial(jax.jit, static_argnames="graph")
def _project(graph, state, index, x, start, counts, rope_lengths) -> tuple[Array, Array, Array]:
    """Queries, keys and values of a layer's attention."""

    def show(q, k, v, layer_input, **where):
        return q, (q, k, v)

    places = {"start": start, "rope_lengths": rope_lengths}
    return nnx.merge(graph, state).run_layer(index, x, counts, show, **places)[1]


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="x")
def _finish(graph, state, index, x, out, start, counts, rope_lengths) -> Array:
    """The layer's output, where its attention gives `out`."""

    def give(q, k, v, layer_input, **where):
        return out, None

    places = {"start": start, "rope_lengths": rope_lengths}
    return nnx.merge(graph, state).run_layer(index, x, counts, give, **places)[0]


@functools.partial(jax.jit, donate_argnames="cache")
def _append(cache: KVCache | QuantisedKV, index: Array, start: Array, k: Array, v: Array) -> tuple[Any, Array, Array]:
    return cache._replace(length=start).append(index, k, v)


@functools.partial(jax.jit, static_argnames=("policy", "num_layers", "scale"), donate_argnames="held")
def _write(held: Any, index: Array, q: Array, k: Array, v: Array, lengths: Array, policy, num_layers, scale) -> Any:
    """What all layers keep, with one layer's in its place."""
    kept = policy.keep(q, k, v, lengths=lengths, layer=index, num_layers=num_layers, scale=scale)
    return jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, index, 0), held, kept)


@functools.partial(jax.jit, static_argnames=("attend", "scale"))
def _dense(q, k, v, *, q_offset, kv_len, attend, scale) -> Array:
    return attend(q, k, v, None, scale=scale, q_offset=q_offset, kv_len=kv_len)[0]


@functools.partial(jax.jit, static_argnames=("how", "scale"))
def _mass(q, k, pattern, *, q_offset, kv_len, scale, how) -> tuple[Array, Array]:
    def sums():
        rows, positions = estimate.last_queries(q, q_offset, kv_len)
        return how.entry.estimate.attention_mass(rows, k, positions, scale=scale)

    def nothing():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums))

    return lax.cond((pattern.kind == PatternKind.VERTICAL_SLASH).any(), sums, nothing)


@functools.partial(jax.jit, static_argnames=("how", "scale"))
def _index(q, k, pattern, *, q_offset, kv_len, scale, how) -> SparseLayout:
    return build_layout(
        q,
        k,
        pattern,
        scale=scale,
        q_offset=q_offset,
        kv_len=kv_len,
        tiles=how.tiles,
        max_num_blocks=how.capacities.num_blocks,
        max_num_columns=how.capacities.num_columns,
        slash_granularity=how.slash_granularity,
        kernels=how.entry.estimate,
    )


@functools.partial(jax.jit, static_argnames=("how", "scale"))
def _kernel(q, k, v, layout, *, q_offset, kv_len, scale, how) -> Array:
    return how.entry.sparse(q, k, v, layout, scale=scale, q_offset=q_offset, kv_len=kv_len, tiles=how.tiles)[0]

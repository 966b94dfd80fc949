"""Prefill and decoding with the cache in host memory, layer by layer.

Each layer is a call of one program. While it computes, the keys and values of the layer before are on their way to the
host, or those of the next on their way to the device: the device holds those of two layers at most.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minference_jax.cache import HostKV, KVCache, attend_split, joined, write_layer
from minference_jax.cache.host import check_host_memory, to_device, to_host
from minference_jax.generate.programs import PrefillResult
from minference_jax.models import Attend, dense_attend
from minference_jax.models.decoder import select_rows
from minference_jax.patterns import PatternArrays


def prefill_to_host(
    graph: Any, state: Any, tokens: np.ndarray, lengths: np.ndarray, patterns: PatternArrays | None, attend: Attend
) -> PrefillResult:
    """As `programs.prefill`, with the plain cache of each layer in pinned host memory as soon as it is made.

    Raises:
        NotImplementedError: the device has no pinned host memory.
    """
    check_host_memory(_device(state))
    num_layers = nnx.merge(graph, state).config.num_layers
    x = _embed(graph, state, tokens)
    k, v, densities = [], [], []
    for index in range(num_layers):
        x, (layer_k, layer_v, density) = _read_layer(graph, state, np.int32(index), x, lengths, patterns, attend)
        k.append(to_host(layer_k))
        v.append(to_host(layer_v))
        densities.append(density)
        if index:
            jax.block_until_ready((k[index - 1], v[index - 1]))  # so that the device frees it before the next is made
    cache = HostKV(tuple(k), tuple(v), jnp.asarray(lengths, jnp.int32))
    return PrefillResult(_finish(graph, state, x, lengths), cache, None if patterns is None else jnp.stack(densities))


def read_behind_host(
    graph: Any,
    state: Any,
    tokens: Any,
    lengths: Any,
    prompt: HostKV,
    tail: KVCache,
    patterns: PatternArrays | None = None,
    attend: Attend = dense_attend,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """As `programs.read_behind`, with prompts in host memory, each layer of which is fetched a layer ahead.

    `tail` is donated.
    """
    x, tail = jax.device_put((_embed(graph, state, tokens), tail), _device(state))  # as what each layer makes is
    coming = to_device(prompt.k[0]), to_device(prompt.v[0])
    densities = []
    for index in range(len(prompt.k)):
        k, v = coming
        if index + 1 < len(prompt.k):
            coming = to_device(prompt.k[index + 1]), to_device(prompt.v[index + 1])
        held = KVCache(k, v, prompt.length)
        x, (tail, density) = _read_layer_behind(graph, state, np.int32(index), x, lengths, held, tail, patterns, attend)
        densities.append(density)
        del k, v, held
        jax.block_until_ready(x)  # so that the device frees this layer's before the next but one is fetched
    density = None if patterns is None else jnp.stack(densities)
    return _finish(graph, state, x, lengths), tail._replace(length=tail.length + lengths), density


def _device(state: Any) -> jax.Device:
    leaf = jax.tree.leaves(state)[0]
    return next(iter(leaf.devices()))


@partial(jax.jit, static_argnames="graph")
def _embed(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).embed(tokens)


@partial(jax.jit, static_argnames="graph")
def _finish(graph: Any, state: Any, x: jax.Array, lengths: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    return model.head(model.final_norm(select_rows(x, lengths, "last")))


@partial(jax.jit, static_argnames=("graph", "attend"), donate_argnames="x")
def _read_layer(graph, state, index, x, lengths, patterns, attend) -> tuple[jax.Array, Any]:
    """Hidden states behind one layer of whole prompts; its keys, values and density."""

    def attend_and_keep(q, k, v, layer_input, **where):
        out, density = attend(q, k, v, layer_input, **where)
        return out, (k, v, density)

    of_layer = jax.tree.map(lambda array: jnp.asarray(array)[index], patterns)
    return nnx.merge(graph, state).run_layer(index, x, lengths, attend_and_keep, of_layer)


@partial(jax.jit, static_argnames=("graph", "attend"), donate_argnames=("x", "tail"))
def _read_layer_behind(graph, state, index, x, lengths, held, tail, patterns, attend) -> tuple[jax.Array, Any]:
    """Hidden states behind one layer of new tokens; the tail with their keys and values, its length as it was, density.

    `held` has the layer's keys and values of the prompts [B, S, K, H] and their lengths.
    """
    prompt = KVCache(held.k[None], held.v[None], held.length)

    def attend_and_write(q, k, v, layer_input, *, scale, **where):
        keys, values = (write_layer(old, new, index, tail.length) for old, new in ((tail.k, k), (tail.v, v)))
        new_k, new_v = (jax.lax.dynamic_slice_in_dim(array, index, 1) for array in (keys, values))
        behind, first, density = KVCache(new_k, new_v, tail.length), jnp.int32(0), None
        if attend is dense_attend:
            out = attend_split(q, prompt, behind, first, scale=scale, count=lengths)
        else:
            out, density = attend(q, *joined(prompt, behind, first, q.dtype), layer_input, scale=scale, **where)
        return out, (tail._replace(k=keys, v=values), density)

    of_layer = jax.tree.map(lambda array: jnp.asarray(array)[index], patterns)
    start = held.length + tail.length
    return nnx.merge(graph, state).run_layer(index, x, lengths, attend_and_write, of_layer, start=start)

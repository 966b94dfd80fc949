"""Reads prompts layer by layer with dense attention, and shows each layer's queries, keys, values and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from minference_jax.attention import dense_attention
from minference_jax.generate import LanguageModel
from minference_jax.generate.prompts import Tokens, pad_prompts
from minference_jax.implementations import memory_for


class LayerActivations(NamedTuple):
    """One layer of one prompt, read with dense attention. T is the prompt's bucket; what lies beyond kv_len is padding.

    Attributes:
        q: [1, T, N, H], turned by their positions.
        k, v: [1, T, K, H].
        out: [1, T, N, H], of dense attention.
        lse: float32 [1, T, N], log-sum-exp of all scores of a query; None where it was not asked for.
        kv_len: int32 [1], tokens of the prompt.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array | None
    kv_len: Array


def read_layers(
    model: LanguageModel, prompts: Sequence[Tokens], *, implementation: str | None = None, return_lse: bool = False
) -> Iterator[list[LayerActivations]]:
    """Yields, layer by layer, the activations of every prompt; what a layer gives to the next is dense attention's.

    One layer of all prompts is held at a time.

    Args:
        model: reads.
        prompts: token ids of each prompt, of any lengths.
        implementation: of dense attention; None = the first that can.
        return_lse: whether to give the log-sum-exp, too.

    Raises:
        ValueError: no prompt, or one that the model can't read. At the call, not at the first layer.
        NotImplementedError: the named implementation can't do the call.
        MemoryError: the device has too little.
    """
    limits = {"vocab_size": model.config.vocab_size, "max_length": model.config.max_length}
    if len(prompts) == 0:
        raise ValueError("at least one prompt is needed, got none")
    padded = []
    for index, prompt in enumerate(prompts):
        try:
            padded.append(pad_prompts([prompt], **limits))
        except ValueError as error:
            raise ValueError(str(error).replace("prompt 0", f"prompt {index}", 1)) from None
    return _layers(model, padded, {"implementation": implementation, "return_lse": return_lse})


def _layers(
    model: LanguageModel, prompts: list[tuple[np.ndarray, np.ndarray]], how: dict[str, Any]
) -> Iterator[list[LayerActivations]]:
    graph, state = nnx.split(model.model)
    longest = max(tokens.shape[1] for tokens, _ in prompts)
    with memory_for(f"reading {len(prompts)} prompts of up to {longest} tokens layer by layer"):
        hidden = [_embed(graph, state, tokens) for tokens, _ in prompts]
    for index in range(model.config.num_layers):
        layer = []
        with memory_for(f"layer {index} of {len(prompts)} prompts of up to {longest} tokens"):
            for place, (_, lengths) in enumerate(prompts):
                hidden[place], activations = _run_layer(graph, state, np.int32(index), hidden[place], lengths, **how)
                layer.append(activations)
        yield layer


@partial(jax.jit, static_argnames="graph")
def _embed(graph: Any, state: Any, tokens: Array) -> Array:
    return nnx.merge(graph, state).embed(tokens)


@partial(jax.jit, static_argnames=("graph", "implementation", "return_lse"), donate_argnames="x")
def _run_layer(
    graph: Any, state: Any, index: Array, x: Array, lengths: Array, *, implementation: str | None, return_lse: bool
) -> tuple[Array, LayerActivations]:
    def attend(q, k, v, layer_input, *, scale, q_offset, kv_len):
        options = {"scale": scale, "kv_len": kv_len, "implementation": implementation}
        if return_lse:
            out, lse = dense_attention(q, k, v, **options, return_lse=True)
        else:
            out, lse = dense_attention(q, k, v, **options), None
        return out, LayerActivations(q, k, v, out, lse, kv_len)

    return nnx.merge(graph, state).run_layer(index, x, jnp.asarray(lengths), attend)

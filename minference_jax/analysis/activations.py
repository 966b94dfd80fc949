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
from minference_jax.generate.prompts import Tokens, bucket_length, pad_prompts
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

    One layer of all prompts is held at a time, if who reads lets go of it (clears the list) before asking for the next.

    Args:
        model: reads.
        prompts: token ids of each prompt, of any lengths.
        implementation: of dense attention; None = the first that can.
        return_lse: whether to give the log-sum-exp, too.

    Raises:
        ValueError: no prompt, or one that the model can't read. At the call, not at the first layer.
        NotImplementedError: the named implementation can't do the call.
        MemoryError: the device has too little; it says how much `activation_bytes` is.
    """
    limits = {"vocab_size": model.config.vocab_size, "max_length": model.config.max_length}
    if len(prompts) == 0:
        raise ValueError("at least one prompt is needed, got none")
    padded = []
    for index, prompt in enumerate(prompts):
        if np.isscalar(prompt):
            raise ValueError(f"prompt {index} must be a list of token ids, got {prompt!r}")
        try:
            padded.append(pad_prompts([prompt], **limits))
        except ValueError as error:
            raise ValueError(str(error).replace("prompt 0", f"prompt {index}", 1)) from None
    return _layers(model, padded, {"implementation": implementation, "return_lse": return_lse})


def activation_bytes(model: LanguageModel, lengths: Sequence[int], *, return_lse: bool = False) -> int:
    """Bytes that `read_layers` holds beside the weights: one layer of all prompts, and the hidden states of all.

    Args:
        model: that reads.
        lengths: tokens of each prompt, at least 1.
        return_lse: as for `read_layers`.

    Raises:
        ValueError: a length below 1.
    """
    config = model.config
    elements = config.hidden_size + 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    token = elements * model.model.dtype.itemsize + 4 * config.num_heads * return_lse
    return token * sum(map(bucket_length, lengths))


def _layers(
    model: LanguageModel, prompts: list[tuple[np.ndarray, np.ndarray]], how: dict[str, Any]
) -> Iterator[list[LayerActivations]]:
    graph, state = nnx.split(model.model)
    sizes = [tokens.shape[1] for tokens, _ in prompts]
    held = activation_bytes(model, sizes, return_lse=how["return_lse"]) / 1e9
    what = f"{len(prompts)} prompts of up to {max(sizes)} tokens, {held:.2f} GB of activations beside the weights,"
    with memory_for(f"reading {what}"):
        hidden = [_embed(graph, state, tokens) for tokens, _ in prompts]
    for index in range(model.config.num_layers):
        layer = []
        with memory_for(f"layer {index} of {what}"):
            for place, (_, lengths) in enumerate(prompts):
                hidden[place], activations = _run_layer(graph, state, np.int32(index), hidden[place], lengths, **how)
                layer.append(activations)
                del activations  # else the last one would outlive the list
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

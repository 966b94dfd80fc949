"""What 8-bit linear layers cost: the error of each product, on what the model really computes there, and of the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minference_jax.generate import LanguageModel
from minference_jax.generate.prompts import Tokens, pad_prompts
from minference_jax.implementations import memory_for
from minference_jax.models import Decoder, dense_attend, quantize_linear
from minference_jax.models.fp8 import Fp8Linear
from minference_jax.models.layers import TOKENS_AT_ONCE


@dataclass(frozen=True, kw_only=True)
class LinearErrors:
    """A model against itself with other linear layers, on one text, with dense attention.

    Attributes:
        tokens: of the text.
        products: by name, such as "attention.q_proj", float32 [L]: the Frobenius norm of what a linear layer's outputs
            are off by over that of the outputs, both of the inputs that the exact model has there.
        logits: the same of the logits after the last token, all layers being quantised.
        exact_nll, nll: mean negative log-likelihood of a token, in nats, with exact and with quantised linear layers.
        nll_error: standard error of the mean of their differences, token by token, taken as independent.
        greedy: share of the tokens for which both find the same token likeliest.
    """

    tokens: int
    products: dict[str, np.ndarray]
    logits: float
    exact_nll: float
    nll: float
    nll_error: float
    greedy: float

    @property
    def exact_perplexity(self) -> float:
        """With exact linear layers."""
        return math.exp(self.exact_nll)

    @property
    def perplexity(self) -> float:
        """With quantised ones."""
        return math.exp(self.nll)


def linear_errors(model: LanguageModel, tokens: Tokens, *, linear: str = "fp8") -> LinearErrors:
    """Compares a model with the same model whose linear layers are quantised; both are held meanwhile.

    Args:
        model: with exact linear layers.
        tokens: of one text, at least 2 and at most `TOKENS_AT_ONCE`.
        linear: as in `quantize_linear`.

    Raises:
        ValueError: linear layers that are quantised already, an unknown `linear`, too few or too many tokens, ids that
            are not the model's.
        MemoryError: the device has too little.
    """
    config = model.config
    _, lengths = pad_prompts([tokens], vocab_size=config.vocab_size, max_length=config.max_length)
    count = int(lengths[0])
    if not 2 <= count <= TOKENS_AT_ONCE:
        raise ValueError(f"linear_errors was given {count} tokens, it needs from 2 to {TOKENS_AT_ONCE}")
    quantized = quantize_linear(model.model, linear)
    fast = LanguageModel(quantized, model.tokenizer, model.patterns, tiles=model.tiles)
    with memory_for(f"a layer of {count} tokens"):
        products = _products(model.model, quantized, np.asarray(tokens, np.int32).reshape(1, -1))
    exact_scores, scores = (one.score(tokens, attention="dense") for one in (model, fast))
    exact_logits, logits = (np.asarray(one.prefill(tokens, attention="dense").logits) for one in (model, fast))
    lost = exact_scores.log_probs.astype(np.float64) - scores.log_probs
    spread = lost.std(ddof=1) if lost.size > 1 else math.nan
    return LinearErrors(
        tokens=count,
        products=products,
        logits=float(np.linalg.norm(logits - exact_logits) / np.linalg.norm(exact_logits)),
        exact_nll=-float(exact_scores.log_probs.mean(dtype=np.float64)),
        nll=-float(scores.log_probs.mean(dtype=np.float64)),
        nll_error=float(spread / math.sqrt(lost.size)),
        greedy=float((scores.greedy == exact_scores.greedy).mean()),
    )


class _Found:
    """What a traced layer has found, by the name of the linear layer."""

    def __init__(self) -> None:
        self.errors: dict[str, jax.Array] = {}


class _Compared(nnx.Module):
    """Gives what the exact linear layer gives, and notes how far the quantised one is off."""

    def __init__(self, exact: nnx.Module, quantized: nnx.Module, name: str, found: _Found):
        self.exact, self.quantized, self.name, self.found = exact, quantized, name, found

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.exact(x)
        wide = out.astype(jnp.float32)
        off = self.quantized(x).astype(jnp.float32) - wide
        self.found.errors[self.name] = jnp.linalg.norm(off) / jnp.linalg.norm(wide)
        return out


def _products(exact: Decoder, quantized: Decoder, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """`LinearErrors.products`, layer by layer. Changes `exact`."""
    found = _Found()
    for path, module in list(nnx.iter_modules(quantized.layers)):
        if isinstance(module, Fp8Linear):
            parent = exact.layers
            for part in path[:-1]:
                parent = getattr(parent, str(part))
            name = str(path[-1])
            setattr(parent, name, _Compared(getattr(parent, name), module, ".".join(map(str, path)), found))
    graph, state = nnx.split(exact)
    x, errors = exact.embed(jnp.asarray(tokens)), []
    for layer in range(exact.config.num_layers):
        x, of_layer = _layer(graph, state, np.int32(layer), x, found)
        errors.append(jax.device_get(of_layer))
    return {name: np.array([one[name] for one in errors], np.float32) for name in errors[0]}


@partial(jax.jit, static_argnames=("graph", "found"))
def _layer(graph: Any, state: Any, index: jax.Array, x: jax.Array, found: _Found) -> tuple[jax.Array, dict]:
    """Hidden states behind a layer, and the error of each of its linear layers."""
    x, _ = nnx.merge(graph, state).run_layer(index, x, jnp.full(1, x.shape[1], jnp.int32), dense_attend)
    errors = dict(found.errors)
    found.errors.clear()
    return x, errors

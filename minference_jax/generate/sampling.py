"""Which token comes next: the likeliest, or one drawn from a distribution that temperature and top-p shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: what logits are divided by; 0 = the likeliest token, always.
        top_p: only the likeliest tokens that together have this probability may be drawn, at least one; 1 = all.

    Raises:
        ValueError: temperature is negative or not finite, top_p is outside (0, 1] or has no effect.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and self.top_p != 1:
            raise ValueError(f"top_p={self.top_p} has no effect at temperature=0; give a temperature above 0")


def check_answer(
    *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, key: jax.Array | None = None
) -> Sampling:
    """How the tokens of an answer are chosen; arguments as in `LanguageModel.decode`.

    Raises:
        ValueError: options out of range, or no key where tokens are to be drawn.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p)
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens at random: give key=jax.random.key(seed)")
    if not isinstance(max_new_tokens, int | np.integer):
        raise ValueError(f"{max_new_tokens=} must be an integer")
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    return sampling


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The next token of each row, int32 [B], and the key for the next choice; `key` itself must not be used again.

    Args:
        logits: float32 [B, V].
        sampling: how to choose.
        key: of jax.random; None where temperature is 0.
    """
    if sampling.temperature == 0:
        return _likeliest(logits), key
    return _draw(logits, key, sampling.temperature, sampling.top_p)


@jax.jit
def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def _draw(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> tuple[jax.Array, jax.Array]:
    next_key, use = jax.random.split(key)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    probability = jax.nn.softmax(ranked, axis=-1)
    likelier = jnp.cumsum(probability, axis=-1) - probability  # of all tokens before this one
    # the first stays whatever rounding says; at 1 the cumulative sum must not cut the tail
    kept = (likelier < top_p) | (top_p >= 1) | (jnp.arange(logits.shape[-1]) == 0)
    rank = jax.random.categorical(use, jnp.where(kept, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32), next_key

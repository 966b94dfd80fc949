"""The compiled programs: prompts are read, their tokens scored, one token or several more read after a cache.

Weights and patterns are arguments: other values of either run the same program.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minference_jax.cache import AnyPolicy, KVCache, Plain, SplitCache, Stored
from minference_jax.models import Attend
from minference_jax.patterns import PatternArrays

_ROWS_AT_ONCE = 128  # tokens whose logits over the whole vocabulary are held at a time


class PrefillResult(NamedTuple):
    """What reading prompts leaves behind; decoding from it leaves it as it is.

    Attributes:
        logits: float32 [B, V], after the last token of each prompt.
        cache: keys and values of the prompts, padded to the bucket; or what another policy than the plain one has
            stored of them; or, of an extension of that, a `SplitCache` of that and of the new tokens.
        density: float32 [L, B, N], each head's share of dense attention's work; None for dense attention. Of a prefill
            in chunks: the mean of the chunks' densities, each weighted by its share of the pairs of query and earlier
            key (dense attention's work), of which a chunk's whole tiles can be more than all. Of an extension with
            sparse attention: for the tokens that it read.
    """

    logits: jax.Array
    cache: Any
    density: jax.Array | None


class Scores(NamedTuple):
    """How likely the tokens of a prompt are.

    Attributes:
        log_probs: float32 [T - 1], natural logarithm of the probability of tokens 1 to T - 1, each after those before.
        greedy: bool [T - 1], where such a token is the likeliest.
        density: float32 [L, N], each head's share of dense attention's work; None for dense attention.
    """

    log_probs: np.ndarray
    greedy: np.ndarray
    density: np.ndarray | None


@partial(jax.jit, static_argnames=("graph", "attend", "policy"))
def prefill(
    graph: Any,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    patterns: PatternArrays | None,
    attend: Attend,
    policy: AnyPolicy,
) -> PrefillResult:
    """Reads prompts into a cache of their own.

    Args:
        graph, state: of a model.
        tokens: int32 [B, T], padded.
        lengths: int32 [B], true lengths.
        patterns: [L, N], or None for dense attention.
        attend: how to attend.
        policy: what to store.
    """
    how: dict[str, Any] = {"lengths": lengths, "attend": attend, "layer_inputs": patterns}
    return PrefillResult(*nnx.merge(graph, state)(tokens, policy, **how))


@partial(jax.jit, static_argnames=("graph", "attend"))
def score_tokens(
    graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array, patterns: PatternArrays | None, attend: Attend
) -> tuple[jax.Array, jax.Array, Any]:
    """Log-probabilities float32 [B, T] and greedy bool [B, T] of the token after each, and what `attend` gave beside.

    Logits are made of few tokens at a time: those of a whole prompt would take more memory than its cache.

    Args: as `prefill`; at `lengths - 1` and beyond the result means nothing.
    """
    model = nnx.merge(graph, state)
    how: dict[str, Any] = {"lengths": lengths, "attend": attend, "layer_inputs": patterns}
    hidden, _, density = model(tokens, Plain(), **how, logits="hidden")

    def score_one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, following = model.head(row[0]), row[1]
        chosen = jnp.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == following

    following = jnp.roll(tokens, -1, axis=1)
    rows = jnp.swapaxes(hidden, 0, 1), following.T  # tokens first
    log_probs, greedy = jax.lax.map(score_one, rows, batch_size=_ROWS_AT_ONCE)
    return log_probs.T, greedy.T, density


@partial(jax.jit, static_argnames=("graph", "attend"), donate_argnames="cache")
def read_more(
    graph: Any,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    patterns: PatternArrays | None,
    attend: Attend,
) -> PrefillResult:
    """Logits after more tokens, the donated cache with them, and the density of reading them.

    Args:
        graph, state: of a model.
        tokens: int32 [B, T], padded.
        lengths: int32 [B], true numbers of new tokens.
        cache: with room for T more in each row.
        patterns: [L, N], or None for dense attention.
        attend: how to attend over the cache.
    """
    return PrefillResult(*nnx.merge(graph, state)(tokens, cache, lengths=lengths, attend=attend, layer_inputs=patterns))


@partial(jax.jit, static_argnames=("graph", "attend"), donate_argnames="tail")
def read_behind(
    graph: Any,
    state: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    prompt: Stored,
    tail: KVCache,
    patterns: PatternArrays | None,
    attend: Attend,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """Logits float32 [B, V] after more tokens, the donated tail with them, and what `attend` gave beside its output.

    Args:
        graph, state: of a model.
        tokens: int32 [B, T], padded.
        lengths: int32 [B], true numbers of new tokens.
        prompt: what a policy has stored, which is only read.
        tail: with room for T more in each row.
        patterns: [L, N], or None for dense attention.
        attend: how to attend over both.
    """
    how: dict[str, Any] = {"lengths": lengths, "attend": attend, "layer_inputs": patterns}
    logits, cache, density = nnx.merge(graph, state)(tokens, SplitCache(prompt, tail), **how)
    return logits, cache.tail, density


@partial(jax.jit, static_argnames="graph", donate_argnames="tail")
def read_token(graph: Any, state: Any, token: jax.Array, prompt: Stored, tail: KVCache) -> tuple[jax.Array, KVCache]:
    """One step of decoding: the next logits float32 [B, V], and the donated tail with one more token in each row.

    Args:
        graph, state: of a model.
        token: int32 [B].
        prompt: what is stored of the prompts, which is only read.
        tail: with room for one more in each row.
    """
    logits, cache, _ = nnx.merge(graph, state)(token[:, None], SplitCache(prompt, tail))
    return logits, cache.tail

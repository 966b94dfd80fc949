"""Tokens after a prefill: what is stored of the prompts is only read, and those tokens go to a plain tail behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from minference_jax.cache import HostKV, KVCache, SplitCache, extend_cache, init_cache
from minference_jax.generate.offloaded import read_behind_host
from minference_jax.generate.programs import PrefillResult, read_behind, read_token
from minference_jax.generate.prompts import bucket_length
from minference_jax.generate.sampling import Sampling, choose
from minference_jax.implementations import memory_for
from minference_jax.models import Attend
from minference_jax.patterns import PatternArrays


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer.

    Attributes:
        tokens: new token ids, without the stop token.
        text: the same as text, without special tokens; None where the model has no tokenizer.
        finish_reason: "stop" where a stop token came, "length" where max_new_tokens were made.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: Literal["stop", "length"]


def split_cache(graph: Any, state: Any, cache: Any, room: int) -> SplitCache:
    """A prefill's cache, not copied, with a tail of its own that has room for `room` more tokens.

    Args:
        graph, state: of the model.
        cache: of a `PrefillResult`; it stays usable.
        room: tokens, at least 1.
    """
    if isinstance(cache, SplitCache):
        held = int(np.asarray(cache.tail.length).max())
        return cache._replace(tail=extend_cache(cache.tail, max(cache.tail.capacity, bucket_length(held + room))))
    model = nnx.merge(graph, state)
    config, batch = model.config, cache.length.shape[0]
    sizes = (config.num_layers, batch, bucket_length(room), config.num_kv_heads, config.head_dim)
    tail = init_cache(*sizes, model.dtype)
    leaf = jax.tree.leaves(state)[0]
    if leaf.committed:  # as what each step makes is: else the first would have a program of its own
        tail = jax.device_put(tail, leaf.sharding)
    return SplitCache(cache, tail)


def decode_tokens(
    graph: Any,
    state: Any,
    prefilled: PrefillResult,
    longest: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
) -> Iterator[np.ndarray]:
    """As `LanguageModel.decode`, of a model's graph and state; `longest` is the tokens of the longest row."""
    logits, cache = prefilled.logits, prefilled.cache
    token: Any = None
    del prefilled
    for made in range(max_new_tokens):
        with memory_for(f"an answer of up to {max_new_tokens} tokens after {longest}"):
            if made == 1:
                cache = split_cache(graph, state, cache, max_new_tokens - 1)
            if made:
                logits, tail = _read_token(graph, state, token, *cache)
                cache = cache._replace(tail=tail)
            token, key = choose(logits, sampling, key)
            tokens = np.asarray(token)
        yield tokens


def _read_token(graph: Any, state: Any, token: jax.Array, prompt: Any, tail: KVCache) -> tuple[jax.Array, KVCache]:
    if isinstance(prompt, HostKV):
        counts = np.ones(token.shape, np.int32)
        return read_behind_host(graph, state, token[:, None], counts, prompt, tail)[:2]
    return read_token(graph, state, token, prompt, tail)


def read_on(
    graph: Any,
    state: Any,
    prefilled: PrefillResult,
    tokens: np.ndarray,
    counts: np.ndarray,
    patterns: PatternArrays | None,
    attend: Attend,
) -> PrefillResult:
    """Reads more tokens behind what is stored of prompts, which is not copied.

    Args:
        graph, state: of a model.
        prefilled: it stays usable.
        tokens: int32 [B, T], padded.
        counts: int32 [B], true numbers of tokens.
        patterns: [L, N], or None for dense attention.
        attend: how to attend; `dense_attend` reads what is stored where it lies.
    """
    prompt, tail = split_cache(graph, state, prefilled.cache, tokens.shape[1])
    read = read_behind_host if isinstance(prompt, HostKV) else read_behind
    logits, tail, density = read(graph, state, tokens, counts, prompt, tail, patterns, attend)
    return PrefillResult(logits, SplitCache(prompt, tail), prefilled.density if patterns is None else density)

"""How a layer reads and writes each kind of cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minference_jax.cache import AnyPolicy, CachePolicy, Host, KVCache, SplitCache, attend_split, write_layer


class CacheAccess(NamedTuple):
    """What a scan over the layers does with a cache.

    Attributes:
        written: arrays of all layers that each layer writes to, carried from one to the next.
        attend: (attend, q, k, v, written, layer, scale) -> (out [B, T, N, H], what `attend` gave beside it, written,
            what is kept of the layer); `attend` has its layer input and scale already.
        close: (written, kept, stacked over the layers) -> the cache with the new tokens.
    """

    written: Any
    attend: Callable[..., tuple[jax.Array, Any, Any, Any]]
    close: Callable[[Any, Any], Any]


def cache_access(cache: KVCache | SplitCache | AnyPolicy, lengths: jax.Array, num_layers: int) -> CacheAccess:
    """How to read and write a cache.

    Args:
        cache: of the tokens before, or the policy of a cache to be made of whole prompts.
        lengths: int32 [B], true number of new tokens.
        num_layers: of the model.

    Raises:
        ValueError: a policy that works outside of the model.
    """
    if isinstance(cache, KVCache):
        return _plain(cache, lengths)
    if isinstance(cache, SplitCache):
        return _split(cache, lengths)
    if isinstance(cache, Host):
        raise ValueError("a cache in host memory is made by LanguageModel.prefill, not by a call of the model")
    return _fresh(cache, lengths, num_layers)


def _plain(cache: KVCache, lengths: jax.Array) -> CacheAccess:
    """New tokens are written behind those before, and attend over both."""
    kv_len = cache.length + lengths

    def attend_cache(attend, q, k, v, written, layer, scale):
        written = tuple(write_layer(x, new, layer, cache.length) for x, new in zip(written, (k, v), strict=True))
        all_k, all_v = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in written)
        out, aux = attend(q, all_k, all_v, q_offset=cache.length, kv_len=kv_len)
        return out, aux, written, None

    return CacheAccess((cache.k, cache.v), attend_cache, lambda written, kept: KVCache(written[0], written[1], kv_len))


def _fresh(policy: CachePolicy, lengths: jax.Array, num_layers: int) -> CacheAccess:
    """Whole prompts attend over their own keys and values as the layer made them, of which the policy keeps some."""

    def attend_prompt(attend, q, k, v, written, layer, scale):
        out, aux = attend(q, k, v, q_offset=jnp.zeros_like(lengths), kv_len=lengths)
        kept = policy.keep(q, k, v, lengths=lengths, layer=layer, num_layers=num_layers, scale=scale)
        return out, aux, written, kept

    return CacheAccess((), attend_prompt, lambda written, kept: policy.stored(kept, lengths))


def _split(cache: SplitCache, lengths: jax.Array) -> CacheAccess:
    """New tokens are written to the tail, and attend over what is stored of the prompts and over the tail."""
    prompt, tail = cache

    def attend_both(attend, q, k, v, written, layer, scale):
        keys, values = (write_layer(x, new, layer, tail.length) for x, new in zip(written, (k, v), strict=True))
        out = attend_split(q, prompt, KVCache(keys, values, tail.length), layer, scale=scale, count=lengths)
        return out, None, (keys, values), None

    def close(written, kept):
        keys, values = written
        return SplitCache(prompt, KVCache(keys, values, tail.length + lengths))

    return CacheAccess((tail.k, tail.v), attend_both, close)

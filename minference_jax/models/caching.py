"""How a layer reads and writes each kind of cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minference_jax.cache import (
    AnyPolicy,
    CachePolicy,
    Growing,
    Host,
    KeptKV,
    KVCache,
    QuantisedKV,
    SplitCache,
    attend_split,
    joined,
    write_layer,
)


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


def cache_access(
    cache: KVCache | QuantisedKV | SplitCache | AnyPolicy, lengths: jax.Array, num_layers: int, *, in_place: bool
) -> CacheAccess:
    """How to read and write a cache.

    Args:
        cache: of the tokens before, or the policy of a cache to be made of whole prompts.
        lengths: int32 [B], true number of new tokens.
        num_layers: of the model.
        in_place: read a `SplitCache` where it lies, with dense attention of our own; False = hand each layer of it to
            `attend`, written out in the model's dtype.

    Raises:
        ValueError: a policy that works outside of the model; `in_place` = False where not every token was kept.
    """
    if isinstance(cache, KVCache | QuantisedKV):
        return _growing(cache, lengths)
    if isinstance(cache, SplitCache):
        if not in_place and isinstance(cache.prompt, KeptKV):
            raise ValueError(
                "this cache has left out tokens of its prompts: read on with attention='dense' and no implementation, "
                "or read the prompts with kv_cache='plain', 'int8', 'fp8' or 'host'"
            )
        return _split(cache, lengths, in_place)
    if isinstance(cache, Host):
        raise ValueError("a cache in host memory is made by LanguageModel.prefill, not by a call of the model")
    return _fresh(cache, lengths, num_layers)


def _growing(cache: Growing, lengths: jax.Array) -> CacheAccess:
    """New tokens are written behind those before, and attend over both."""
    kv_len = cache.length + lengths

    def attend_cache(attend, q, k, v, written, layer, scale):
        written, all_k, all_v = written.append(layer, k, v)
        out, aux = attend(q, all_k, all_v, q_offset=cache.length, kv_len=kv_len)
        return out, aux, written, None

    return CacheAccess(cache, attend_cache, lambda written, kept: written._replace(length=kv_len))


def _fresh(policy: CachePolicy, lengths: jax.Array, num_layers: int) -> CacheAccess:
    """Whole prompts attend over their own keys and values as the layer made them, of which the policy keeps some."""

    def attend_prompt(attend, q, k, v, written, layer, scale):
        out, aux = attend(q, k, v, q_offset=jnp.zeros_like(lengths), kv_len=lengths)
        kept = policy.keep(q, k, v, lengths=lengths, layer=layer, num_layers=num_layers, scale=scale)
        return out, aux, written, kept

    return CacheAccess((), attend_prompt, lambda written, kept: policy.stored(kept, lengths))


def _split(cache: SplitCache, lengths: jax.Array, in_place: bool) -> CacheAccess:
    """New tokens are written to the tail, and attend over what is stored of the prompts and over the tail."""
    prompt, tail = cache

    def attend_both(attend, q, k, v, written, layer, scale):
        keys, values = (write_layer(x, new, layer, tail.length) for x, new in zip(written, (k, v), strict=True))
        behind = KVCache(keys, values, tail.length)
        if in_place:
            return attend_split(q, prompt, behind, layer, scale=scale, count=lengths), None, (keys, values), None
        where = {"q_offset": cache.length, "kv_len": cache.length + lengths}
        out, aux = attend(q, *joined(prompt, behind, layer, q.dtype), **where)
        return out, aux, (keys, values), None

    def close(written, kept):
        keys, values = written
        return SplitCache(prompt, KVCache(keys, values, tail.length + lengths))

    return CacheAccess((tail.k, tail.v), attend_both, close)

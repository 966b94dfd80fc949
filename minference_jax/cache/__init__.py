"""Key/value caches: a policy says what is kept of prompts and how it is read again; there is one file for each.

`policy` tells what every one answers to, `plain` keeps everything, `split` reads any of them in decoding.
"""

from __future__ import annotations

from minference_jax.cache.host import Host, HostKV
from minference_jax.cache.kept import KeptKV, empty_kept
from minference_jax.cache.plain import KVCache, Plain, extend_cache, init_cache, write_layer
from minference_jax.cache.policy import CachePolicy, Growing, Stored
from minference_jax.cache.pyramidkv import PyramidKV
from minference_jax.cache.quantised import QuantisationError, Quantised, QuantisedKV, quantisation_error
from minference_jax.cache.snapkv import SnapKV
from minference_jax.cache.split import SplitCache, attend_split, joined
from minference_jax.cache.streaming_llm import StreamingLLM

AnyPolicy = Plain | Quantised | Host | SnapKV | PyramidKV | StreamingLLM

POLICIES: dict[str, AnyPolicy] = {
    "plain": Plain(),
    "int8": Quantised("int8"),
    "fp8": Quantised("float8_e4m3fn"),
    "host": Host(),
    "snapkv": SnapKV(),
    "pyramidkv": PyramidKV(),
    "streaming_llm": StreamingLLM(),
}
"""Policies by name, with the sizes of their authors."""


def policy_of(kv_cache: str | AnyPolicy) -> AnyPolicy:
    """The policy of that name, or the policy itself.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(kv_cache, AnyPolicy):
        return kv_cache
    if not isinstance(kv_cache, str) or kv_cache not in POLICIES:
        raise ValueError(f"{kv_cache=} must be a cache policy or one of {', '.join(POLICIES)}")
    return POLICIES[kv_cache]


__all__ = [
    "POLICIES",
    "AnyPolicy",
    "CachePolicy",
    "Growing",
    "Host",
    "HostKV",
    "KVCache",
    "KeptKV",
    "Plain",
    "PyramidKV",
    "QuantisationError",
    "Quantised",
    "QuantisedKV",
    "SnapKV",
    "SplitCache",
    "Stored",
    "StreamingLLM",
    "attend_split",
    "empty_kept",
    "extend_cache",
    "init_cache",
    "joined",
    "policy_of",
    "quantisation_error",
    "write_layer",
]

"""StreamingLLM: the first tokens of a prompt and its last.

Source: arXiv 2309.17453. Keys stay turned for their positions in the prompt, as in MInference's comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from minference_jax.cache.kept import Kept, KeptKV, check_sizes, keep_positions


@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """A policy: of each prompt the sinks and the recent tokens are kept; a shorter prompt is kept whole.

    Attributes:
        sink_size: tokens at the start.
        recent_size: tokens at the end.

    Raises:
        ValueError: a size below 1.
    """

    sink_size: int = 128
    recent_size: int = 3968
    name: ClassVar[str] = "streaming_llm"

    def __post_init__(self) -> None:
        check_sizes(sink_size=self.sink_size, recent_size=self.recent_size)

    def keep(self, q, k, v, *, lengths, layer, num_layers, scale) -> Kept:
        """As in `CachePolicy`."""
        size, num_kv_heads = k.shape[1:3]
        capacity = self.sink_size + self.recent_size
        slots = jnp.arange(min(size, capacity), dtype=jnp.int32)
        left_out = jnp.maximum(lengths - capacity, 0)[:, None]
        positions = jnp.where(slots < self.sink_size, slots, slots + left_out)
        counts = jnp.minimum(lengths, capacity)
        positions = jnp.where(slots < counts[:, None], positions, size)
        return keep_positions(k, v, jnp.repeat(positions[..., None], num_kv_heads, axis=2), counts)

    def stored(self, kept: Kept, length: jax.Array) -> KeptKV:
        """As in `CachePolicy`."""
        return KeptKV(*kept, length)

"""PyramidKV: as SnapKV, with more room in the first layers than in the last.

Source: arXiv 2406.02069.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.cache.kept import Kept, KeptKV, check_sizes, keep_positions
from minference_jax.cache.snapkv import best_positions, window_scores


@dataclass(frozen=True, kw_only=True)
class PyramidKV:
    """A policy: as `SnapKV` with `capacity` tokens on average, fewer from layer to layer.

    A prompt of at most `capacity` tokens is kept whole. Beside the window, the first layer keeps 2 c - c / beta tokens
    and the last c / beta, c = capacity - window_size, and those between them lie on a line. All layers' arrays have the
    slots of the first, with counts.

    Attributes:
        capacity: tokens that a KV head keeps, the window among them, averaged over the layers.
        window_size: last tokens of the prompt: they are kept, and their queries choose the others.
        pool_size: tokens over which scores are averaged, an odd number.
        beta: how steep it is: the last layer keeps 1 / beta of the average.

    Raises:
        ValueError: a size below 1, a window that leaves no room, an even pool_size.
    """

    capacity: int = 4096
    window_size: int = 32
    pool_size: int = 5
    beta: int = 20
    name: ClassVar[str] = "pyramidkv"

    def __post_init__(self) -> None:
        sizes = {"capacity": self.capacity, "window_size": self.window_size, "pool_size": self.pool_size}
        check_sizes(**sizes, beta=self.beta)
        if self.window_size >= self.capacity or self.pool_size % 2 == 0:
            raise ValueError(
                f"window_size={self.window_size} must be below capacity={self.capacity}, "
                f"and pool_size={self.pool_size} odd"
            )

    def budgets(self, num_layers: int) -> np.ndarray:
        """Tokens that a KV head of each layer keeps of a long prompt, the window among them: int32 [L]."""
        others = self.capacity - self.window_size
        least = others // self.beta
        line = np.linspace(2 * others - least, least, num_layers) if num_layers > 1 else np.array([others])
        return self.window_size + line.astype(np.int32)

    def keep(self, q, k, v, *, lengths, layer, num_layers, scale) -> Kept:
        """As in `CachePolicy`."""
        budgets = self.budgets(num_layers)
        counts = jnp.where(lengths <= self.capacity, lengths, jnp.minimum(lengths, jnp.asarray(budgets)[layer]))
        scores = window_scores(q, k, lengths, self.window_size, self.pool_size, scale)
        slots = min(k.shape[1], max(self.capacity, int(budgets.max())))
        return keep_positions(k, v, best_positions(scores, slots, counts), counts)

    def stored(self, kept: Kept, length: jax.Array) -> KeptKV:
        """As in `CachePolicy`."""
        return KeptKV(*kept, length)

"""Sparse attention inside whole prefills over lists of a stated kind, beside an estimate that runs but chooses nothing.

Random weights give activations without structure, whose estimate finds scattered slashes that cover everything. Here
most slashes are the nearest distances, the other slashes and all verticals are at random. The estimate of the layer is
computed as ever and added to what the lists are chosen by, so small that it changes none: its time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from minference_jax.estimate import EstimateKernels
from minference_jax.generate.attend import SparseAttend
from minference_jax.implementations import Implementation, device_of, first_sparse
from minference_jax.index import build_layout
from minference_jax.kernels.layouts import density
from minference_jax.patterns import PatternArrays

_UNSEEN = 1e-30  # what the estimate is multiplied with: far below the last digit of what it is added to


@dataclass(frozen=True, kw_only=True)
class ConstructedAttend(SparseAttend):
    """As `SparseAttend`, over constructed lists.

    Attributes:
      local_share: of each vertical-slash head's slashes, those that are the nearest distances; above 0 and below 1.
    """

    local_share: float

    def entry(self, q: Array) -> Implementation:
        """What computes, with an estimate that chooses the constructed lists."""
        entry = first_sparse(self.implementation, device_of(q), q.shape[3], q.dtype.itemsize)
        mass = _Mass(entry.estimate.attention_mass, self.local_share)
        return entry._replace(estimate=EstimateKernels(mass, entry.estimate.top_k_mask))

    def __call__(self, q, k, v, layer_input: PatternArrays, *, scale, q_offset, kv_len) -> Any:
        entry = self.entry(q)
        attention: Any = entry.sparse
        where: dict[str, Any] = {"scale": scale, "q_offset": q_offset, "kv_len": kv_len}
        where["tiles"] = self.tiles or entry.tiles(device_of(q), q.shape[3], q.dtype.itemsize)
        layout = build_layout(
            q,
            k,
            layer_input,
            max_num_blocks=self.capacities.num_blocks,
            max_num_columns=min(self.capacities.num_columns, k.shape[1]),
            slash_granularity=self.slash_granularity,
            kernels=entry.estimate,
            **where,
        )
        out, _ = attention(q, k, v, layout, **where)
        return out, density(layout, q_offset, kv_len, q.shape[1], where["tiles"])


@dataclass(frozen=True)
class _Mass:
    """An attention mass by whose largest entries any number of slashes has the share of nearest ones."""

    real: Callable[..., tuple[Array, Array]]
    local_share: float

    def __call__(self, rows: Array, k: Array, positions: Array, *, scale: float) -> tuple[Array, Array]:
        keys, distances = self.real(rows, k, positions, scale=scale)
        drawn = [jax.random.uniform(jax.random.key(seed), keys.shape) for seed in range(2)]
        return _first(drawn[0]) + _UNSEEN * keys, _first(self._rank(drawn[1])) + _UNSEEN * distances

    def _rank(self, drawn: Array) -> Array:
        """Of each distance: the nearest come share by share before those that were drawn early."""
        size, share = drawn.shape[-1], self.local_share
        return jnp.minimum(jnp.arange(size) / share, drawn * size / (1 - share)) / size


def _first(rank: Array) -> Array:
    """A mass above 0 that is the larger, the lower the rank."""
    return 1.0 / (1.0 + rank)

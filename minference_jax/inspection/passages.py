"""What the last queries of a prompt read of each passage; the very last one gives the answer's first token."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from minference_jax.analysis import LayerActivations
from minference_jax.estimate import LAST_Q, last_queries
from minference_jax.kernels.layouts import SparseLayout, tile_mask
from minference_jax.kernels.tiles import TileConfig


class Passage(NamedTuple):
    """A run of tokens, and what some heads make of it.

    Attributes:
        start, end: first token and the one behind the last.
        mass: share of the last queries' dense attention that falls on it, mean over the heads.
        lost: the part of that on keys that are not kept.
        kept: share of the pairs of a last query and a token of it that are computed, mean over the heads.
        heads_reading: how many of the heads compute any such pair; 0 = it is left out altogether.
    """

    start: int
    end: int
    mass: float
    lost: float
    kept: float
    heads_reading: int


class Passages(NamedTuple):
    """All passages of a prompt, for all heads.

    Attributes:
        size: tokens of a passage; the last one may have fewer.
        num_tokens: of the prompt.
        mass, lost, kept: float32 [L, N, P]; see `Passage`.
    """

    size: int
    num_tokens: int
    mass: np.ndarray
    lost: np.ndarray
    kept: np.ndarray

    def left_out(self, layer: int | None = None, head: int | None = None, *, count: int | None = None) -> list[Passage]:
        """The passages of which something is not kept, those with the most lost attention first.

        Args:
            layer: None = of all layers together.
            head: None = of all heads together.
            count: give so many; None = all.

        Raises:
            ValueError: there is no such layer or head.
        """
        for name, index, most in (("layer", layer, self.mass.shape[0]), ("head", head, self.mass.shape[1])):
            if index is not None and not 0 <= index < most:
                raise ValueError(f"{name} {index} is not one of 0 to {most - 1}")
        which = tuple(slice(None) if index is None else slice(index, index + 1) for index in (layer, head))
        mass, lost, kept = (x[which].reshape(-1, x.shape[-1]) for x in (self.mass, self.lost, self.kept))
        means = [x.mean(axis=0) for x in (mass, lost, kept)]
        order = [place for place in np.lexsort((means[2], -means[1])).tolist() if (kept[:, place] < 1).any()]
        return [
            Passage(
                start=place * self.size,
                end=min((place + 1) * self.size, self.num_tokens),
                mass=float(means[0][place]),
                lost=float(means[1][place]),
                kept=float(means[2][place]),
                heads_reading=int((kept[:, place] > 0).sum()),
            )
            for place in order[:count]
        ]


def read_passages(
    layer: LayerActivations, layout: SparseLayout, *, passage_size: int, tiles: TileConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mass, lost and kept of every passage by the last 64 queries of each head: float32 [N, P]; see `Passage`.

    Args:
        layer: activations of one layer of one prompt.
        layout: of its N heads. tiles: for which it was built.
        passage_size: tokens, at least 1.
    """
    found = _read(layer.q, layer.k, layout, layer.kv_len, passage_size=passage_size, tiles=tiles)
    num_passages = -(-int(layer.kv_len[0]) // passage_size)
    mass, lost, kept, pairs = (np.asarray(x)[:, :num_passages] for x in found)
    return mass, lost, kept / pairs


@partial(jax.jit, static_argnames=("passage_size", "tiles"))
def _read(q, k, layout, kv_len, *, passage_size, tiles) -> tuple[Array, ...]:
    size, head_dim = k.shape[1], k.shape[3]
    group_size = q.shape[2] // k.shape[2]
    rows, positions = last_queries(q, jnp.zeros_like(kv_len), kv_len)
    first = jnp.maximum(kv_len[0] - LAST_Q, 0) // tiles.block_q
    num_tiles = -(-(LAST_Q - 1) // tiles.block_q) + 1  # that the last queries can lie in
    key = jnp.arange(size, dtype=jnp.int32)
    seen = key <= positions[0][:, None]

    def pool(x):  # [L, S] -> [P], summed over the queries
        x = jnp.pad(x.sum(axis=0, dtype=jnp.float32), (0, -size % passage_size))
        return x.reshape(-1, passage_size).sum(axis=1)

    def head(args):
        index, q, layout = args
        alone = jax.tree.map(lambda x: x[None, None], layout)
        mask = [tile_mask(alone, first + i, 0 * kv_len, kv_len, size, tiles)[0, 0] for i in range(num_tiles)]
        kept = jnp.concatenate(mask)[jnp.maximum(positions[0] - first * tiles.block_q, 0)] & seen
        keys = lax.dynamic_index_in_dim(k[0], index // group_size, axis=1, keepdims=False)
        scores = jnp.einsum("lh,sh->ls", q, keys, precision="highest", preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0) / jnp.minimum(kv_len[0], LAST_Q)
        return pool(weights), pool(jnp.where(kept, 0.0, weights)), pool(kept), pool(seen)

    layouts = jax.tree.map(lambda x: x[0], layout)
    return lax.map(head, (jnp.arange(q.shape[2]), rows[0].swapaxes(0, 1), layouts))

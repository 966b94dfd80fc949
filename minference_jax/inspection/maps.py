"""The attention map of one head, scaled down to a picture, and the share of each of its pixels that is kept."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from minference_jax.analysis import LayerActivations
from minference_jax.kernels.layouts import SparseLayout, tile_mask
from minference_jax.kernels.tiles import TileConfig


class HeadMap(NamedTuple):
    """One head's map in R x R pixels, queries down and keys across.

    Attributes:
        layer, head: whose.
        pixel: tokens along a side of a pixel.
        num_tokens: of the prompt.
        attention: float32 [R, R], share of a query's dense attention that falls on the keys of a pixel, mean over the
            pixel's queries.
        kept: float32 [R, R], share of a pixel's causal pairs that are computed; NaN where it has none.
    """

    layer: int
    head: int
    pixel: int
    num_tokens: int
    attention: np.ndarray
    kept: np.ndarray


def head_map(
    layer: LayerActivations, layout: SparseLayout, index: int, head: int, *, pixels: int, tiles: TileConfig
) -> HeadMap:
    """Computes the map tile by tile of queries: memory is linear in the prompt.

    Args:
        layer: activations of one layer of one prompt.
        layout: of its N heads. tiles: for which it was built.
        index, head: which layer and head it is.
        pixels: most pixels along a side.
    """
    num_tokens = int(layer.kv_len[0])
    pixel = -(-num_tokens // pixels)
    side = -(-num_tokens // pixel)
    kv_head = head // (layer.q.shape[2] // layer.k.shape[2])
    q = jnp.pad(layer.q[0, :, head], ((0, -layer.q.shape[1] % tiles.block_q), (0, 0)))
    own = jax.tree.map(lambda x: x[:, head : head + 1], layout)
    sums = np.zeros((3, side, side), np.float64)
    for tile in range(-(-num_tokens // tiles.block_q)):
        rows = np.arange(tile * tiles.block_q, min((tile + 1) * tiles.block_q, num_tokens))
        found = _tile(q, layer.k[0, :, kv_head], own, np.int32(tile), layer.kv_len, pixel=pixel, tiles=tiles)
        for total, part in zip(sums, found, strict=True):
            np.add.at(total, rows // pixel, np.asarray(part)[: rows.size, :side])
    attention, kept, pairs = sums
    rows_of = np.bincount(np.arange(num_tokens) // pixel)[:, None]
    share = np.divide(kept, pairs, out=np.full_like(kept, np.nan), where=pairs > 0)
    return HeadMap(index, head, pixel, num_tokens, *(x.astype(np.float32) for x in (attention / rows_of, share)))


@partial(jax.jit, static_argnames=("pixel", "tiles"))
def _tile(q, k, layout, tile, kv_len, *, pixel, tiles) -> tuple[Array, Array, Array]:
    """Sums over pixels along the keys, for each query of a tile: attention, kept pairs, causal pairs [block_q, R]."""
    size = k.shape[0]
    start = tile * tiles.block_q
    rows = lax.dynamic_slice_in_dim(q, start, tiles.block_q)
    position = (start + jnp.arange(tiles.block_q, dtype=jnp.int32))[:, None]
    key = jnp.arange(size, dtype=jnp.int32)
    seen = (key <= position) & (key < kv_len) & (position < kv_len)
    scores = jnp.einsum("th,sh->ts", rows, k, precision="highest", preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen, scores * k.shape[1] ** -0.5, jnp.finfo(jnp.float32).min), axis=-1)
    kept = tile_mask(layout, tile, jnp.zeros_like(kv_len), kv_len, size, tiles)[0, 0]

    def pool(x):
        return jnp.pad(x, ((0, 0), (0, -size % pixel))).reshape(x.shape[0], -1, pixel).sum(axis=-1, dtype=jnp.float32)

    return pool(jnp.where(seen, weights, 0.0)), pool(kept), pool(seen)

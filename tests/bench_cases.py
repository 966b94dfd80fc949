"""Small cases of the attention suite, one of each kind, and their constructed lists."""

import dataclasses

import jax.numpy as jnp

from minference_jax.bench import cases, inputs
from minference_jax.kernels.layouts import layout_mask
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import AShape, BlockSparse, Dense, VerticalSlash

SLASHES = cases.Sizes(pattern=VerticalSlash(vertical_size=40, slash_size=70), local_share=0.9)
SMALL = cases.Case(
    name="small", sizes=(SLASHES,), num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32", lengths=(300,)
)
KINDS = {
    "line": SMALL,
    "block": dataclasses.replace(SMALL, slash_granularity="block"),
    "A-shape": dataclasses.replace(SMALL, sizes=(cases.Sizes(pattern=AShape(sink_size=20, window_size=90)),)),
    "block-sparse": dataclasses.replace(
        SMALL, sizes=(cases.Sizes(pattern=BlockSparse(num_blocks=1), density=0.4),), dtype="bfloat16"
    ),
    "dense": dataclasses.replace(SMALL, sizes=(cases.Sizes(pattern=Dense()),), num_kv_heads=1),
}
TILES = {"64x64": TileConfig(), "128x64": TileConfig(block_q=128), "32x16": TileConfig(block_q=32, block_kv=16)}


def constructed(case, length, tiles):
    """A case's layout at a length, with room for every column."""
    return inputs.constructed_layout(case, length, tiles, num_columns=length)


def meaning(layout, length, tiles):
    """The pairs that a layout keeps of a whole prompt, bool [1, N, T, T]."""
    return layout_mask(layout, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), length, length, tiles)

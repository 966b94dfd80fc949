"""The oracle of the attention suite: errors are found wherever they are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from bench_cases import KINDS, SMALL, TILES, constructed, meaning

from minference_jax import implementations
from minference_jax.bench import inputs, oracle
from minference_jax.kernels.layouts import SparseLayout


@pytest.mark.parametrize("wrong", [jnp.nan, 1.1])
@pytest.mark.parametrize("dtype", oracle.TOLERANCES)
def test_errors_are_found_in_any_row_whatever_they_are(dtype, wrong):
    tiles, where = TILES["32x16"], {"scale": 0.25, "dtype": dtype}
    qkv = inputs.random_activations(dataclasses.replace(SMALL, dtype=dtype), 100)
    layout = constructed(KINDS["dense"], 100, tiles)
    out = implementations.flash_xla.attention(
        *qkv, scale=0.25, q_offset=jnp.zeros(1, jnp.int32), kv_len=jnp.full(1, 100), tiles=tiles
    )[0]
    for find in (oracle.whole_error, oracle.sampled_error):
        assert 0 < float(find(qkv, out, layout, tiles=tiles, **where)) <= oracle.TOLERANCES[dtype]
        broken = out.at[0, 98:, 3].multiply(wrong)
        with pytest.raises(oracle.WrongResult, match="a name: the error"):
            oracle.check(float(find(qkv, broken, layout, tiles=tiles, **where)), dtype, "a name")


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "A-shape"])
def test_a_tile_of_the_mask_is_that_of_the_whole(kind, tiles):
    length = 300
    layout = constructed(KINDS[kind], length, tiles)
    layout = layout._replace(windows=layout.windows.at[0, 1].set(77))
    mask = meaning(layout, length, tiles)[0]
    for head in range(SMALL.num_heads):
        lists = SparseLayout(*(x[0, head] for x in layout))
        for tile in range(-(-length // tiles.block_q)):
            rows = slice(tile * tiles.block_q, (tile + 1) * tiles.block_q)
            found = oracle.tile_mask(lists, tile, length, tiles)
            np.testing.assert_array_equal(found[: mask[head, rows].shape[0]], mask[head, rows])
            assert not found[mask[head, rows].shape[0] :].any()

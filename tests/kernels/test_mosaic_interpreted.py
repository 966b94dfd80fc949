"""The Mosaic GPU kernel without a GPU: what its layout keeps is what it computes, and its warpgroups do not race."""

import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest
from tolerances import LSE, kernel_bound

from minference_jax import implementations
from minference_jax.index import build_layout
from minference_jax.kernels import reference, sparse_mosaic_gpu
from minference_jax.kernels.layouts import layout_mask
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import AShape, BlockSparse, ModelPatterns, PatternArrays, VerticalSlash

pytestmark = pytest.mark.skipif(mosaic_interpreter.why_not() is not None, reason=str(mosaic_interpreter.why_not()))

HEADS = (
    VerticalSlash(vertical_size=40, slash_size=110),
    AShape(sink_size=5, window_size=170),
    BlockSparse(num_blocks=2),
)
CASES = {
    "a chunk, head_dim 64": {"H": 64, "stages": 4},
    "unequal lengths, head_dim 128": {"H": 128, "stages": 3, "T": 200, "S": 200, "lengths": [[0, 200], [0, 70]]},
    "tiles of 128, head_dim 80, float16": {"H": 80, "stages": 3, "size": 128, "dtype": "float16"},
    "few stages": {"H": 64, "stages": 2},
    "few registers": {"H": 64, "stages": 2, "moves_registers": False},
    "head_dim 256": {"H": 256, "stages": 2},
    "head_dim 192, unequal lengths": {"H": 192, "stages": 3, "T": 200, "S": 200, "lengths": [[0, 200], [0, 70]]},
    "head_dim 256, a threshold below all": {"H": 256, "stages": 2, "skip_threshold": 1e-30},
    "a threshold below all": {"H": 64, "stages": 4, "skip_threshold": 1e-30},
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_exactly_what_its_layout_keeps_and_has_no_races(name):
    case = {"T": 64, "S": 300, "lengths": [[236, 300]], "size": 64, "dtype": "bfloat16"}
    case |= {"moves_registers": True, "skip_threshold": None} | CASES[name]
    size, lengths = case["size"], np.array(case["lengths"], np.int32)
    rng = np.random.default_rng(0)
    shapes = [(len(lengths), *shape) for shape in ((case["T"], 3, case["H"]), *[(case["S"], 1, case["H"])] * 2)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), case["dtype"]) for shape in shapes)
    where = {"q_offset": jnp.asarray(lengths[:, 0]), "kv_len": jnp.asarray(lengths[:, 1])}
    where["tiles"] = TileConfig(block_q=size, block_kv=size, num_stages=case["stages"])
    table = ModelPatterns(layers=(HEADS,), source="a test").arrays()
    pattern = PatternArrays(*(jnp.asarray(x[0]) for x in table))
    (entry,) = implementations.named("xla")
    how = {"max_num_blocks": 8, "max_num_columns": case["S"], "kernels": entry.estimate, "slash_granularity": "line"}
    layout = build_layout(q, k, pattern, scale=0.1, **where, **how)
    with mosaic_interpreter.interpreted(case["moves_registers"]):
        out, lse = sparse_mosaic_gpu.attention(
            q, k, v, layout, scale=0.1, skip_threshold=case["skip_threshold"], **where
        )
    mask = layout_mask(layout, where["q_offset"], where["kv_len"], case["T"], case["S"], where["tiles"])
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_lse = reference.attention(*exact, mask, scale=0.1)
    plain, _ = reference.attention(q, k, v, mask, scale=0.1)
    row = lengths[:, :1] + np.arange(case["T"])
    causal = np.minimum(row + 1, lengths[:, 1:]) * (row < lengths[:, 1:])
    assert (mask.sum(axis=-1) < causal[:, None]).any()
    assert np.abs(out.astype(jnp.float32) - expected).max() <= kernel_bound(plain, expected, q.dtype)
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE, atol=LSE)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_what_lies_below_the_threshold_is_left_out(head_dim):
    rng = np.random.default_rng(0)
    sign = np.where(np.arange(600) < 400, -1, 1)[:, None, None]  # of all scores of a key
    q, k = (np.abs(rng.standard_normal((1, n, 1, head_dim))) for n in (64, 600))
    v = rng.standard_normal((1, 600, 1, head_dim))
    v[:, 100:200] = np.nan  # does not show where the values are not added
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k * sign, v))
    where = {"q_offset": jnp.full(1, 536), "kv_len": jnp.full(1, 600), "tiles": TileConfig(num_stages=2)}
    with mosaic_interpreter.interpreted():
        out, _ = sparse_mosaic_gpu.dense(q, k, v, scale=1.0, skip_threshold=1e-3, **where)
    exact = [x.astype(jnp.float32) for x in (q, k, jnp.nan_to_num(v))]
    mask = jnp.arange(600) <= 536 + jnp.arange(64)[:, None]
    expected, _ = reference.attention(*exact, mask[None, None], scale=1.0)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)

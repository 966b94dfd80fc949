"""The Mosaic GPU kernel against the oracle on exactly the pairs its layout keeps, on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import LSE, kernel_bound

from minference_jax import attention, implementations
from minference_jax.index import build_layout
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import SparseLayout, layout_mask
from minference_jax.kernels.tiles import (
    Device,
    TileConfig,
    check_mosaic_gpu_tiles,
    mosaic_gpu_tiles,
    mosaic_gpu_widest,
)
from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, PatternArrays, VerticalSlash

H100 = Device(platform="cuda", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
HEADS = (
    VerticalSlash(vertical_size=40, slash_size=110),
    AShape(sink_size=5, window_size=170),
    BlockSparse(num_blocks=3),
    Dense(),
    VerticalSlash(vertical_size=90, slash_size=60),
    AShape(sink_size=70, window_size=64),
    BlockSparse(num_blocks=5),
    VerticalSlash(vertical_size=30, slash_size=300),
)
CHUNKS = {"T": 300, "S": 1000, "B": 2, "kv_len": [900, 1000], "q_offset": [600, 345]}
LARGE_TILES = {"T": 500, "S": 1100, "q_offset": 461, "kv_len": 961, "size": 128}
CASES = {
    "whole tiles": {},
    "unaligned": {"T": 777},
    "the fewest queries": {"T": 64, "S": 300, "q_offset": 236},
    "unequal lengths, padding of NaN": {"T": 900, "B": 2, "kv_len": [900, 333]},
    "chunks at offsets": CHUNKS,
    "tiles of 128": {"size": 128},
    "tiles of 128, a chunk": LARGE_TILES,
    "head_dim 64, float16": {"H": 64, "dtype": "float16"},
    "head_dim 96": {"H": 96},
    "head_dim 80": {"H": 80, "T": 500},
    "head_dim 96, chunks at offsets": CHUNKS | {"H": 96},
    "head_dim 80, float16, tiles of 128": {"H": 80, "dtype": "float16", "size": 128},
    "head_dim 256": {"H": 256},
    "head_dim 256, unaligned, one KV head": {"H": 256, "T": 777, "K": 1},
    "head_dim 256, the fewest queries": {"H": 256, "T": 64, "S": 300, "q_offset": 236},
    "head_dim 256, unequal lengths, padding of NaN": {"H": 256, "T": 900, "B": 2, "kv_len": [900, 333]},
    "head_dim 256, chunks at offsets": CHUNKS | {"H": 256},
    "head_dim 256, float16, tiles of 128": {"H": 256, "dtype": "float16", "size": 128},
    "head_dim 256, tiles of 128, a chunk": LARGE_TILES | {"H": 256},
    "head_dim 256, block diagonals": {"H": 256, "T": 1500, "slash_granularity": "block"},
    "head_dim 256, no listed blocks": {"H": 256, "listed": False},
    "head_dim 192": {"H": 192, "T": 900},
    "head_dim 136, tiles of 128": {"H": 136, "T": 500, "size": 128},
    "negative scale": {"scale": -0.05},
    "scale of zero": {"scale": 0.0},
    "one KV head": {"K": 1},
    "a KV head for each": {"K": 8},
    "block diagonals": {"T": 1500, "slash_granularity": "block"},
    "block diagonals, tiles of 128": {"T": 1500, "slash_granularity": "block", "size": 128},
    "no listed blocks": {"listed": False},
    "a sequence without keys": {"B": 2, "kv_len": [0, 1000], "T": 1000},
    "float16": {"dtype": "float16"},
}


def patterns(listed=True):
    heads = [head if listed or not isinstance(head, BlockSparse) else HEADS[0] for head in HEADS]
    table = ModelPatterns(layers=(tuple(heads),), source="a test").arrays()
    return PatternArrays(*(jnp.asarray(x[0]) for x in table))


def make(T=1024, S=None, B=1, K=2, H=128, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    shapes = ((B, T, len(HEADS), H), (B, S or T, K, H), (B, S or T, K, H))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_computes_exactly_what_its_layout_keeps(name):
    case = dict(CASES[name])
    size, scale = case.pop("size", 64), case.pop("scale", 0.1)
    how = {"slash_granularity": case.pop("slash_granularity", "line")}
    kv_len, q_offset, listed = case.pop("kv_len", None), case.pop("q_offset", 0), case.pop("listed", True)
    q, k, v = make(**case)
    batch, kv_capacity = k.shape[:2]
    where = {
        "kv_len": jnp.broadcast_to(jnp.asarray(kv_capacity if kv_len is None else kv_len, jnp.int32), (batch,)),
        "q_offset": jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,)),
        "tiles": dataclasses.replace(mosaic_gpu_tiles(H100, q.shape[3], 2), block_q=size, block_kv=size),
    }
    (entry,) = implementations.named("mosaic_gpu")
    how |= {"max_num_blocks": 128 if listed else 0, "max_num_columns": kv_capacity, "kernels": entry.estimate}
    layout = jax.jit(functools.partial(build_layout, scale=scale, **where, **how))(q, k, patterns(listed))
    is_padding = (jnp.arange(kv_capacity) >= where["kv_len"][:, None])[..., None, None]
    with_nan = [jnp.where(is_padding, jnp.nan, x) for x in (k, v)]
    run = jax.jit(functools.partial(entry.sparse, scale=scale, **where))
    out, lse = run(q, *with_nan, layout)
    mask = layout_mask(layout, where["q_offset"], where["kv_len"], q.shape[1], kv_capacity, where["tiles"])
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, expected_lse = reference.attention(*exact, mask, scale=scale)
    plain, _ = reference.attention(q, k, v, mask, scale=scale)
    assert np.abs(out.astype(jnp.float32) - expected).max() <= kernel_bound(plain, expected, q.dtype)
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE, atol=LSE)
    again, lse_again = run(q, *with_nan, layout)
    np.testing.assert_array_equal(out.view(jnp.uint16), again.view(jnp.uint16))
    np.testing.assert_array_equal(lse, lse_again)


@pytest.mark.gpu
def test_it_is_what_hopper_takes_and_a_head_that_cannot_be_honoured_is_nan():
    q, k, v = make()
    pattern = patterns()._replace(vertical_size=jnp.full(len(HEADS), 2000))
    run = functools.partial(attention.sparse_attention, max_num_columns=100)
    named = functools.partial(run, implementation="mosaic_gpu")
    out, chosen = (np.asarray(jax.jit(each)(q, k, v, pattern).astype(jnp.float32)) for each in (named, run))
    is_bad = [isinstance(head, VerticalSlash) for head in HEADS]
    np.testing.assert_array_equal(np.isnan(out).all(axis=(0, 1, 3)), is_bad)
    np.testing.assert_array_equal(np.isnan(out).any(axis=(0, 1, 3)), is_bad)
    np.testing.assert_array_equal(out, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
@pytest.mark.parametrize("where", [{}, {"q_offset": [200, 0], "kv_len": [700, 333]}])
def test_dense_attention_is_the_oracles(where, head_dim):
    q, k, v = make(T=500, S=700, B=2, H=head_dim)
    where = {"q_offset": [200, 200], "kv_len": [700, 700]} | where
    given = {name: jnp.asarray(value, jnp.int32) for name, value in where.items()}
    run = functools.partial(attention.dense_attention, return_lse=True, scale=0.1, **given)
    out, lse = run(q, k, v, implementation="mosaic_gpu")
    plain, _ = run(q, k, v, implementation="xla")
    expected, expected_lse = run(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="xla")
    assert np.abs(out.astype(jnp.float32) - expected).max() <= kernel_bound(plain, expected, q.dtype)
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE, atol=LSE)


@pytest.mark.gpu
def test_a_nan_that_is_read_shows():
    q, k, v = make(T=500)
    how = {"return_lse": True, "implementation": "mosaic_gpu"}
    out, lse = attention.sparse_attention(q, k.at[:, 100].set(jnp.nan), v, AShape(sink_size=5, window_size=170), **how)
    for result in (out.sum(axis=(0, 2, 3)), lse.sum(axis=(0, 2))):
        np.testing.assert_array_equal(np.isnan(result), np.isin(np.arange(500), np.arange(100, 270)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kept", "size", "low"),  # where a step begins, which is half a tile of queries before theirs where blocks are 64
    [(Dense(), 64, 320), (Dense(), 128, 256), *((AShape(sink_size=4, window_size=170), size, 4) for size in (64, 128))],
)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_steps_below_a_threshold_are_left_out_unless_they_hold_nan(kept, low, size, head_dim):
    q, k, v = make(T=1100, H=head_dim)
    q, k = q.at[..., 0].set(16), k.at[..., 0].set(8).at[:, :low, :, 0].set(-8)  # exp(-25) between them, and noise
    how = {"implementation": "mosaic_gpu", "tiles": TileConfig(block_q=size, block_kv=size), "kv_len": 1050}
    run = functools.partial(attention.sparse_attention, pattern=kept, scale=0.1, q_offset=0, **how)
    huge = v.at[:, :low].set(1e30)
    late = slice(512, 1050)
    expected = run(q, k, v)[:, late].astype(jnp.float32)
    assert np.abs(run(q, k, huge)[:, late].astype(jnp.float32)).min() > 1e6
    for padding in (-16, jnp.nan):  # such queries heed the first keys alone, or nothing at all, and have no say
        padded = q.at[:, 1050:, :, 0].set(padding)
        found = run(padded, k, huge, skip_threshold=1e-5)[:, late].astype(jnp.float32)
        np.testing.assert_allclose(found, expected, atol=1e-2)
    out = run(q, k.at[:, 1].set(jnp.nan), v, skip_threshold=1e-5)
    assert np.isnan(out[:, 1:1050].astype(jnp.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_threshold_that_nothing_lies_below_changes_nothing(head_dim):
    q, k, v = make(T=777, H=head_dim)
    run = functools.partial(attention.sparse_attention, q, k, v, patterns(), implementation="mosaic_gpu")
    for found, expected in zip(*(run(skip_threshold=t, return_lse=True) for t in (1e-30, None)), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-2)


@pytest.mark.gpu
def test_vmap_is_a_batch():
    q, k, v = make(T=300, B=2)
    run = functools.partial(attention.vertical_slash_attention, implementation="mosaic_gpu")
    each = jax.vmap(lambda *one: run(*(x[None] for x in one))[0])(q, k, v)
    np.testing.assert_array_equal(each, run(q, k, v))


@pytest.mark.parametrize(
    ("device", "head_dim", "itemsize", "message"),
    [
        (dataclasses.replace(H100, kind="an A100", compute_capability=(8, 0)), 128, 2, "9.0, not an A100"),
        (dataclasses.replace(H100, kind="a B200", compute_capability=(10, 0)), 128, 2, "9.0, not a B200"),
        (H100, 128, 4, "from 64 to 256, .* not 128 in 4 bytes"),
        (H100, 264, 2, "from 64 to 256, .* not 264 in 2 bytes"),
        (H100, 48, 2, "from 64 to 256, .* not 48 in 2 bytes"),
        (H100, 100, 2, "from 64 to 256, .* not 100 in 2 bytes"),
    ],
)
def test_what_it_cannot_do_is_declined_by_name(device, head_dim, itemsize, message):
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu_tiles(device, head_dim, itemsize)


def test_fewer_queries_than_a_warpgroup_takes_are_declined():
    (entry,) = implementations.named("mosaic_gpu")
    q, k, v = make(T=63, S=200)
    where = {"q_offset": jnp.zeros(1, jnp.int32), "kv_len": jnp.full(1, 200), "tiles": TileConfig()}
    with pytest.raises(NotImplementedError, match="needs 64 queries and keys, not 63 and 200"):
        entry.dense(q, k, v, scale=1.0, **where)


def traced_with_room_for(num_columns, num_kv_heads):
    """The shapes that attention of 32 heads gives at 128K tokens."""
    shapes = [jax.ShapeDtypeStruct((1, 131072, heads, 128), jnp.bfloat16) for heads in (32, *(2 * [num_kv_heads]))]
    (entry,) = implementations.named("mosaic_gpu")
    heads, of_tiles = (1, 32), (1, 32, 2048)
    sizes = {
        "offsets": (*heads, 2051),
        "offset_counts": heads,
        "columns": (*heads, num_columns),
        "column_counts": heads,
    }
    sizes |= {"windows": heads, "block_ids": (*of_tiles, 0), "block_counts": of_tiles}
    layout = SparseLayout(**{name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in sizes.items()})
    where = {"q_offset": jnp.zeros(1, jnp.int32), "kv_len": jnp.full(1, 131072), "tiles": TileConfig(num_stages=3)}
    return jax.eval_shape(functools.partial(entry.sparse, scale=1.0, **where), *shapes, layout)


def test_room_for_more_columns_than_memory_should_hold_is_declined():
    with pytest.raises(NotImplementedError, match="for 131072 columns it needs 17179869184 bytes, more than queries"):
        traced_with_room_for(131072, num_kv_heads=8)


def test_columns_of_a_published_pattern_are_taken_with_one_kv_head():
    out, lse = traced_with_room_for(3500, num_kv_heads=1)
    assert (out.shape, lse.shape) == ((1, 131072, 32, 128), (1, 131072, 32))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_q": 128, "block_kv": 64}, "must be 64 queries by 64 keys or 128 by 128"),
        ({"num_warps": 8}, "with num_warps=4"),
        ({"num_stages": 4}, "has 232448"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_in_one_sentence(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_mosaic_gpu_tiles(TileConfig(**sizes), H100, 128, 2)


@pytest.mark.parametrize(("head_dim", "stages"), [(64, 4), (80, 3), (128, 3), (192, 3), (256, 2)])
def test_chosen_tiles_fit(head_dim, stages):
    if head_dim > mosaic_gpu_widest():
        with pytest.raises(NotImplementedError, match=r"or to 192 from jax 0\.12 on, not 256 in 2 bytes"):
            mosaic_gpu_tiles(H100, head_dim, 2)
        return
    tiles = mosaic_gpu_tiles(H100, head_dim, 2)
    assert tiles == TileConfig(num_stages=stages)
    check_mosaic_gpu_tiles(tiles, H100, head_dim, 2)

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_jax.kernels.layouts import (
    FAR,
    SparseLayout,
    compact,
    computed_keys,
    density,
    layout_mask,
    listed_counts,
    make_dense,
    slash_offsets,
    tile_mask,
)
from minference_jax.kernels.tiles import TileConfig

SIZE = 400
TILES = [TileConfig(), TileConfig(block_q=128, block_kv=64), TileConfig(block_q=32, block_kv=32)]


def offsets_of(distances, tiles):
    slashes = np.zeros(SIZE, bool)
    slashes[list(distances)] = True
    offsets, count = slash_offsets(jnp.asarray(slashes), tiles)
    return np.asarray(offsets), int(count)


def layout_of(distances=(), columns=(), blocks=None, window=FAR, q_len=SIZE, tiles=TILES[0]):
    """One sequence, one head."""
    offsets, count = offsets_of(distances, tiles)
    kept = np.zeros(SIZE, bool)
    kept[list(columns)] = True
    num_tiles = -(-q_len // tiles.block_q)
    ids = np.full((num_tiles, 4), FAR)
    for row, listed in zip(ids, blocks or [[]] * num_tiles, strict=True):
        row[: len(listed)] = listed
    parts = (offsets, count, compact(jnp.asarray(kept), SIZE), kept.sum(), window, ids, (ids < FAR).sum(-1))
    return SparseLayout(*(jnp.asarray(x, jnp.int32)[None, None] for x in parts))


def mask_of(layout, q_offset=0, kv_len=SIZE, q_len=SIZE, tiles=TILES[0]):
    return np.asarray(layout_mask(layout, jnp.array([q_offset]), jnp.array([kv_len]), q_len, SIZE, tiles))[0, 0]


@settings(max_examples=40)
@given(distances=st.sets(st.integers(0, SIZE - 1), max_size=60), tiles=st.sampled_from(TILES))
def test_blocks_cover_every_slash_once_and_nothing_in_vain(distances, tiles):
    offsets, count = offsets_of(distances, tiles)
    used = offsets[:count]
    assert (offsets[count:] == -FAR).all()
    assert (np.diff(used) <= -tiles.block_kv).all()  # descending and never overlapping
    covered = {int(o) + i for o in used for i in range(tiles.block_kv)}
    needed = {i - d for d in distances for i in range(tiles.block_q)}
    assert needed <= covered
    for o in used:
        assert needed & set(range(int(o), int(o) + tiles.block_kv))


def test_an_isolated_slash_costs_one_block():
    offsets, count = offsets_of([137], TILES[0])
    assert (count, offsets[0]) == (1, -137)


def test_the_nearest_distances_make_blocks_aligned_with_the_tile():
    offsets, count = offsets_of(range(100), TILES[0])
    np.testing.assert_array_equal(offsets[:count], [0, -64, -128])


@given(mask=st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=40)
def test_compact_lists_the_true_positions_in_order(mask):
    found = np.asarray(compact(jnp.asarray(mask), len(mask) + 2))
    kept = np.flatnonzero(mask)
    np.testing.assert_array_equal(found[: len(kept)], kept)
    assert (found[len(kept) :] == FAR).all()


def test_mask_holds_every_selected_pair_and_only_causal_ones():
    distances, columns = [0, 1, 2, 90, 200], [3, 77, 250]
    mask = mask_of(layout_of(distances, columns))
    i, j = np.mgrid[:SIZE, :SIZE]
    selected = (np.isin(i - j, distances) | np.isin(j, columns)) & (j <= i)
    assert mask[selected].all()
    assert not mask[j > i].any()
    assert mask.diagonal().all()


def test_window_cuts_slash_blocks_to_the_token_but_not_columns():
    mask = mask_of(layout_of(range(70), columns=range(5), window=70))
    i, j = np.mgrid[:SIZE, :SIZE]
    np.testing.assert_array_equal(mask, (j <= i) & ((i - j < 70) | (j < 5)))


def test_listed_blocks_belong_to_their_tile_only():
    blocks = [[0], [0, 1], [2], [1, 3], [4], [0, 5], [6]]
    mask = mask_of(layout_of(blocks=blocks))
    i, j = np.mgrid[:SIZE, :SIZE]
    expected = np.array([[b in blocks[t] for b in range(7)] for t in range(7)])[i // 64, j // 64] & (j <= i)
    np.testing.assert_array_equal(mask, expected)


def test_a_tile_reads_no_more_blocks_than_its_list_has_room_for():
    layout = layout_of(blocks=[[0], [0, 1], [2], [1, 3], [4], [0, 5], [6]])
    asked = layout._replace(block_counts=jnp.full_like(layout.block_counts, 30))
    starts = jnp.arange(7)[None] * 64
    _, total = listed_counts(asked, starts, jnp.asarray([SIZE]), TileConfig())
    np.testing.assert_array_equal(total, np.full((1, 1, 7), layout.block_ids.shape[-1]))


def test_padding_rows_and_keys_are_never_attended():
    mask = mask_of(layout_of(range(SIZE)), kv_len=100)
    assert not mask[100:].any()
    assert not mask[:, 100:].any()
    assert mask[99, :100].all()


def test_a_chunk_at_an_offset_has_the_rows_of_the_whole():
    layout = layout_of([0, 1, 150], columns=[7, 200])
    whole, chunk = mask_of(layout), mask_of(layout, q_offset=128, q_len=200)
    np.testing.assert_array_equal(chunk, whole[128:328])


def test_density_counts_the_tiles_that_are_computed():
    at, length = jnp.array([0]), jnp.array([SIZE])
    share = lambda layout: float(density(layout, at, length, SIZE, TILES[0])[0, 0])  # noqa: E731
    assert share(layout_of(range(SIZE))) == 1.0
    keys = np.asarray(computed_keys(layout_of(range(64), columns=range(10)), at, length, SIZE, TILES[0]))[0, 0]
    np.testing.assert_array_equal(keys, [74, 138, 138, 138, 138, 138, 138])
    assert share(layout_of(range(64), columns=range(10))) == pytest.approx(keys.sum() / (64 * 28))


def test_make_dense_keeps_everything_for_the_marked_heads_only():
    one = layout_of([0, 150], columns=[3])
    two = SparseLayout(*(jnp.concatenate([x, x], axis=1) for x in one))
    dense = make_dense(two, jnp.array([[False, True]]), SIZE, TILES[0])
    masks = np.asarray(layout_mask(dense, jnp.array([0]), jnp.array([SIZE]), SIZE, SIZE, TILES[0]))[0]
    np.testing.assert_array_equal(masks[0], mask_of(one))
    np.testing.assert_array_equal(masks[1], np.tri(SIZE, dtype=bool))


@pytest.mark.parametrize("sizes", [{"block_kv": 48}, {"block_kv": 0}, {"block_q": 96}, {"block_q": 0}])
def test_tile_sizes_that_kernels_cannot_use_are_refused(sizes):
    with pytest.raises(ValueError, match="must be a"):
        TileConfig(**sizes)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("q_offset", [0, 128])
def test_the_mask_of_a_tile_is_its_rows_of_the_whole(tiles, q_offset):
    q_len, kv_len = 200, 300
    blocks = [[tile // 2, tile // 2 + 1] for tile in range(-(-q_len // tiles.block_q))]
    options = {"columns": [0, 3, 250], "blocks": blocks, "window": 90, "q_len": q_len, "tiles": tiles}
    layout = layout_of([0, 1, 70, 260], **options)
    whole = mask_of(layout, q_offset, kv_len, q_len, tiles)
    for tile in range(len(blocks)):
        found = tile_mask(layout, jnp.int32(tile), jnp.array([q_offset]), jnp.array([kv_len]), SIZE, tiles)
        rows = whole[tile * tiles.block_q : (tile + 1) * tiles.block_q]
        np.testing.assert_array_equal(np.asarray(found)[0, 0, : len(rows)], rows)

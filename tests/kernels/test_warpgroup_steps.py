"""Steps mean exactly the pairs of the layout, each of them once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minference_jax.kernels.layouts import FAR, SparseLayout, compact, layout_mask, slash_offsets
from minference_jax.kernels.tiles import TileConfig
from minference_jax.kernels.warpgroup_steps import HALF, WHOLE, first_rows, listed_bounds, slash_steps

SIZE = 700
TILES = [TileConfig(block_q=size, block_kv=size) for size in (HALF, WHOLE)]


def layout_of(distances, columns, window, blocks, q_len, tiles):
    """One sequence, one head; blocks is one list for each query tile."""
    kept = np.zeros((2, SIZE), bool)
    kept[0, list(distances)] = True
    kept[1, list(columns)] = True
    offsets, count = slash_offsets(jnp.asarray(kept[0]), tiles)
    ids = np.full((-(-q_len // tiles.block_q), 6), FAR)
    for row, listed in zip(ids, blocks, strict=False):
        row[: len(listed)] = sorted(listed)
    parts = (offsets, count, compact(jnp.asarray(kept[1]), SIZE), kept[1].sum(), window, ids, (ids < FAR).sum(-1))
    return SparseLayout(*(jnp.asarray(x, jnp.int32)[None, None] for x in parts))


def taken(layout, q_offset, kv_len, q_len, tiles):
    """How often the kernel's steps count each pair, and in steps without a mask, how often any pair at all."""
    where = (jnp.array([q_offset]), jnp.array([kv_len]), q_len, tiles)
    whole, split = (
        None if steps is None else [np.asarray(x)[0, 0] for x in steps] for steps in slash_steps(layout, *where)
    )
    listed = np.asarray(listed_bounds(layout, *where))[0, 0]
    ids, window = np.asarray(layout.block_ids)[0, 0], int(layout.windows[0, 0])
    rows = np.asarray(first_rows(layout.columns, layout, where[0], q_len, SIZE, tiles).astype(jnp.float32))[0, 0]
    columns = np.asarray(layout.columns)[0, 0]
    counts = np.zeros((len(listed) * WHOLE, SIZE), int)

    def add(half, tile, start, size, masked):
        first = tile * WHOLE + half * HALF
        row, key = q_offset + first + np.arange(HALF)[:, None], start + np.arange(size)
        distance = row - key
        seen = (distance >= 0) & (distance < window) & (key >= 0)
        assert masked or seen[: max(0, kv_len - q_offset - first)].all()
        counts[first : first + HALF, key[(key >= 0) & (key < SIZE)]] += seen[:, (key >= 0) & (key < SIZE)]

    for tile in range(len(listed)):
        start = q_offset + tile * WHOLE
        for steps, is_split in ((whole, False), (split, True)):
            if steps is None:
                continue
            near, inside, end = steps[1][tile]
            for place in range(end):
                starts = start + steps[0][place]
                for half in range(2):
                    at = starts[half] if is_split else starts[0]
                    add(half, tile, at, HALF if is_split else WHOLE, not near <= place < inside)
                assert is_split or starts[1] == starts[0] + HALF
        near, inside, end = listed[tile]
        for place in range(end):
            for half in range(2):
                row = 2 * tile + half if tiles.block_q == HALF else tile
                block = ids[row, place] if row < len(ids) else FAR
                if block < FAR:
                    add(half, tile, block * tiles.block_kv, tiles.block_kv, not near <= place < inside)
        for half in range(2):
            first = tile * WHOLE + half * HALF
            for column, row in zip(columns, rows[tile, half], strict=True):
                if column < FAR:
                    counts[first + int(row) : first + HALF, column] += 1
                else:
                    assert row == HALF
    counts = counts[:q_len]
    counts[max(0, kv_len - q_offset) :] = 0
    return counts


LENGTHS = st.sampled_from([1, 193, 500])  # few, since each is compiled for
near_and_far = st.sets(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 300)), max_size=80)


@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(
    distances=near_and_far,
    run=st.tuples(st.integers(0, 500), st.integers(0, 400)),
    columns=near_and_far,
    window=st.sampled_from([FAR, 1, 100, 333]),
    chunk=st.tuples(st.integers(0, 150), LENGTHS),
    tiles=st.sampled_from(TILES),
    data=st.data(),
)
def test_steps_take_each_pair_of_the_layout_once(distances, run, columns, window, chunk, tiles, data):
    q_offset, q_len = chunk
    kv_len = data.draw(st.integers(1, min(SIZE, q_offset + q_len)))
    distances = distances | set(range(run[0], min(sum(run), SIZE)))
    columns = {column for column in columns if column < kv_len}
    layout = layout_of(distances, columns, window, [], q_len, tiles)
    counts = taken(layout, q_offset, kv_len, q_len, tiles)
    mask = np.asarray(layout_mask(layout, jnp.array([q_offset]), jnp.array([kv_len]), q_len, SIZE, tiles))[0, 0]
    np.testing.assert_array_equal(counts, mask)


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(tiles=st.sampled_from(TILES), q_len=LENGTHS, data=st.data())
def test_steps_take_each_listed_block_once(tiles, q_len, data):
    blocks = []
    for tile in range(-(-q_len // tiles.block_q)):
        last = (min((tile + 1) * tiles.block_q, q_len) - 1) // tiles.block_kv
        blocks.append(data.draw(st.sets(st.integers(0, last), min_size=1, max_size=6)))
    layout = layout_of([], [], FAR, blocks, q_len, tiles)
    counts = taken(layout, 0, q_len, q_len, tiles)
    mask = np.asarray(layout_mask(layout, jnp.array([0]), jnp.array([q_len]), q_len, SIZE, tiles))[0, 0]
    np.testing.assert_array_equal(counts, mask)


@pytest.mark.parametrize("length", range(1, 8))
def test_what_both_warpgroups_need_is_brought_once(length):
    """n blocks side by side are 2 n of a warpgroup: as many whole steps as can be, of two blocks for both."""
    slashes = jnp.zeros((1, 1, SIZE), bool).at[..., : HALF * (length - 1) + 1].set(True)
    offsets, counts = slash_offsets(slashes, TILES[0])
    assert int(counts[0, 0]) == length
    none = jnp.zeros((1, 1, 0), jnp.int32)
    blocks = jnp.zeros((1, 1, SIZE // HALF + 1, 0), jnp.int32), jnp.zeros((1, 1, SIZE // HALF + 1), jnp.int32)
    layout = SparseLayout(offsets, counts, none, counts * 0, jnp.full((1, 1), FAR), *blocks)
    whole, split = slash_steps(layout, jnp.array([0]), jnp.array([SIZE]), SIZE, TILES[0])
    steps = [int((jax.device_get(x.starts)[0, 0, :, 0] > -FAR).sum()) for x in (whole, split)]
    assert steps == [(length - 1) // 2, 1 if length % 2 else 2]

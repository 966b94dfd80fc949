"""Cases of the attention suite and what they are measured on: constructed lists, random and saved activations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from bench_cases import KINDS, SLASHES, SMALL, TILES, constructed, meaning

from minference_jax.bench import cases, inputs
from minference_jax.kernels.layouts import computed_keys, density
from minference_jax.kernels.tiles import TileConfig


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_constructed_slashes_are_near_but_for_the_stated_share(tiles):
    length, wanted = 1024, SLASHES.pattern.slash_size
    layout = constructed(SMALL, length, tiles)
    mask = np.asarray(meaning(layout, length, tiles))[0]
    for head, columns in zip(mask, np.asarray(layout.columns)[0], strict=True):
        verticals = columns[columns < length]
        assert verticals.size == np.unique(verticals).size == SLASHES.pattern.vertical_size
        assert (verticals[:30] == np.arange(30)).all()
        slashes = [d for d in range(length - 1) if np.diagonal(head, -d).all()]
        assert set(range(round(0.9 * wanted))) <= set(slashes)
        assert max(slashes) > 4 * wanted


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_constructed_block_diagonals_are_as_many_as_the_estimate_keeps_and_aligned(tiles):
    layout = constructed(KINDS["block"], 4096, tiles)
    wanted = (SLASHES.pattern.slash_size + 2 * tiles.block_kv - 2) // tiles.block_kv
    used = np.asarray(layout.offsets)[0][:, : int(layout.offset_counts.max())]
    assert (used[used > -4096 - tiles.block_q] % tiles.block_kv == 0).all()
    extra = tiles.block_q // tiles.block_kv - 1  # rows of a tall tile reach further
    assert (np.asarray(layout.offset_counts) >= wanted).all()
    assert (np.asarray(layout.offset_counts) <= wanted + 2 * extra * wanted).all()


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_random_blocks_have_the_stated_density_and_hold_their_own_positions(tiles):
    length, case = 1024, KINDS["block-sparse"]
    layout = constructed(case, length, tiles)
    at, valid = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
    np.testing.assert_allclose(density(layout, at, valid, length, tiles), 0.4, atol=0.06)
    mask = np.asarray(meaning(layout, length, tiles))[0]
    assert np.diagonal(mask, axis1=1, axis2=2).all()
    assert (mask[0] != mask[1]).any()
    keys = computed_keys(layout, at, valid, length, tiles)[0, 0]
    assert (keys == layout.block_counts[0, 0] * tiles.block_kv).all()


def test_random_activations_are_of_the_shape_and_kind_of_the_case(monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK", 64)
    case = dataclasses.replace(SMALL, dtype="bfloat16")
    q, k, v = inputs.random_activations(case, 301)
    assert (q.shape, k.shape, v.shape) == ((1, 301, 4, 16), (1, 301, 2, 16), (1, 301, 2, 16))
    assert {str(x.dtype) for x in (q, k, v)} == {"bfloat16"}
    assert abs(float(q.astype(jnp.float32).std()) - 1) < 0.05
    assert len(np.unique(np.asarray(q[0, :, 0, :8], np.float32), axis=0)) == 301
    assert not (k == v).all()


def test_gpu_cases_have_the_sizes_of_the_targets():
    found = {case.name: case for case in cases.GPU_CASES}
    sizes = {length: found["VS line"].sizes_at(length, TileConfig()) for length in found["VS line"].lengths}
    assert [s.pattern.slash_size for s in sizes.values()] == [600, 600, 2048, 6096, 6096, 6096]
    assert [s.local_share for s in sizes.values()] == [0.97, 0.97, 0.97, 0.98, 0.98, 0.98]
    assert found["VS block"].slash_granularity == "block"
    listed = found["block-sparse"]
    assert [listed.sizes_at(131072, tiles).pattern.num_blocks for tiles in TILES.values()] == [105, 105, 420]
    assert {(case.num_heads, case.dtype) for case in found.values()} == {(32, "bfloat16")}


def test_cases_are_chosen_by_their_names_or_parts_of_them_and_lengths_rise():
    def names(texts):
        return [case.name for case in cases.select_cases(cases.GPU_CASES, texts)]

    assert names(["VS line"]) == ["VS line"]
    assert names(["dense", "KV head"]) == ["dense", "VS line, 1 KV head", "VS line, 32 KV heads"]
    planned = cases.plan(cases.select_cases(cases.GPU_CASES, ["VS"]), [512, 256])
    assert [length for _, length in planned] == [256] * 8 + [512] * 8


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"q": np.zeros((4, 2, 8))}, "it has q"),
        ({"q": np.zeros((4, 3, 8)), "k": np.zeros((4, 2, 8)), "v": np.zeros((4, 2, 8))}, "N a multiple of K"),
        ({"q": np.zeros((4, 2, 8)), "k": np.zeros((4, 2, 8)), "v": np.zeros((4, 2, 8))}, "float16 or float32"),
        ({"q": np.zeros((4, 8)), "k": np.zeros((4, 8)), "v": np.zeros((4, 8))}, "it has q float64"),
    ],
)
def test_files_that_hold_no_activations_are_refused(arrays, sentence, tmp_path):
    np.savez(tmp_path / "given.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        inputs.read_activations(tmp_path / "given.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"must be a \.npz file"):
        inputs.read_activations(tmp_path / "text.npz")

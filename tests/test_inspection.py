"""Inspection: figures against the whole matrices on a small model, what is not read is listed, pictures are drawn."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import AShape, BlockSparse, ModelPatterns, VerticalSlash, inspect_attention, load
from minference_jax.analysis import head_layouts, read_layers, settings_for
from minference_jax.inspection.passages import Passages
from minference_jax.inspection.pictures import draw_head, draw_heat_maps
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import layout_mask
from minference_jax.patterns import PatternArrays

HEADS = (
    VerticalSlash(vertical_size=30, slash_size=50),
    AShape(sink_size=3, window_size=70),
    BlockSparse(num_blocks=2),
    AShape(sink_size=512, window_size=512),
)
PATTERNS = ModelPatterns(layers=(HEADS,) * NUM_LAYERS, source="a test")
LENGTH, SIZE = 450, 40
PROMPT = np.random.default_rng(2).integers(0, 256, LENGTH).tolist()
pytestmark = pytest.mark.usefixtures("oracle_first")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("models") / "hf"))


@pytest.fixture(scope="module")
def found(model):
    options = {"maps": [(1, 0), (0, 2)], "map_pixels": 100, "passage_size": SIZE, "measure_time": True}
    return inspect_attention(model, PROMPT, pattern=PATTERNS, **options)


@pytest.fixture(scope="module")
def whole(model):
    """For each layer: which pairs are kept and dense attention's weights, [N, T, T], and both outputs [T, N, H]."""
    settings = settings_for(model)
    layers = []
    for index, (x,) in enumerate(read_layers(model, [PROMPT])):
        layout = head_layouts(x, PatternArrays(*(a[index] for a in PATTERNS.arrays())), settings)
        q, k, v = (a[:, :LENGTH] for a in (x.q, x.k, x.v))
        mask = layout_mask(layout, jnp.array([0]), jnp.array([LENGTH]), LENGTH, LENGTH, settings.tiles)
        causal = jnp.broadcast_to(jnp.tri(LENGTH, dtype=bool), mask.shape)
        out, dense = (np.asarray(reference.attention(q, k, v, m, scale=8**-0.5)[0])[0] for m in (mask, causal))
        scores = jnp.einsum("tnh,snh->nts", q[0], jnp.repeat(k[0], 2, axis=1), precision="highest") * 8**-0.5
        weights = jnp.exp(scores - reference.attention(q, k, v, causal, scale=8**-0.5)[1][0].T[..., None])
        layers.append((np.asarray(mask)[0], np.asarray(jnp.where(causal[0], weights, 0.0)), out, dense))
    return layers


def test_mass_error_and_density_are_those_of_the_whole_matrices(model, found, whole):
    assert found.mass.shape == found.error.shape == found.density.shape == (NUM_LAYERS, NUM_HEADS)
    for index, (mask, weights, out, dense) in enumerate(whole):
        np.testing.assert_allclose(found.mass[index], (weights * mask).sum(axis=(1, 2)) / LENGTH, atol=1e-4)
        error = np.sqrt(np.square(out - dense).sum(axis=(0, 2)) / np.square(dense).sum(axis=(0, 2)))
        np.testing.assert_allclose(found.error[index], error, atol=1e-4)
    ran = model.prefill(PROMPT, pattern=PATTERNS).density
    np.testing.assert_allclose(found.density[0], np.asarray(ran)[0, 0], rtol=1e-6)
    np.testing.assert_allclose(found.mass[:, 3], 1, atol=1e-5)
    assert found.error[:, 3].max() < 1e-5


def test_passages_are_what_the_last_queries_read(found, whole):
    rows = slice(LENGTH - 64, LENGTH)
    edges = np.arange(0, LENGTH, SIZE)
    for index, (mask, weights, _, _) in enumerate(whole):
        kept, mass = mask[:, rows], weights[:, rows] / 64
        causal = np.tri(LENGTH, dtype=bool)[rows]
        sums = (np.add.reduceat(x.sum(axis=-2), edges, axis=-1) for x in (mass, mass * ~kept, kept, causal))
        of_mass, lost, pairs, all_pairs = sums
        np.testing.assert_allclose(found.passages.mass[index], of_mass, atol=1e-5)
        np.testing.assert_allclose(found.passages.lost[index], lost, atol=1e-5)
        np.testing.assert_allclose(found.passages.kept[index], pairs / all_pairs, atol=1e-6)


def test_what_a_window_leaves_behind_is_listed_with_the_most_lost_first(found):
    unread = found.passages.left_out(0, 1)  # 3 sinks, a window of 70: nothing between is read
    lost = [one.lost for one in unread]
    assert lost == sorted(lost, reverse=True)
    assert all(one.end - one.start == SIZE for one in unread[:-1])
    nothing_kept = {one.start for one in unread if one.heads_reading == 0}
    assert nothing_kept == set(range(SIZE, LENGTH - 64 - 70 - SIZE + 1, SIZE))
    assert found.passages.left_out(0, 3) == []
    everyone = {one.start: one for one in found.passages.left_out()}
    assert max(one.heads_reading for one in everyone.values()) == NUM_LAYERS * NUM_HEADS
    assert min(one.heads_reading for one in everyone.values()) >= NUM_LAYERS  # the heads that keep everything
    assert len(found.passages.left_out(0, 1, count=2)) == 2
    assert sum(one.mass for one in unread) <= 1


def test_a_passage_that_no_head_reads_is_said_to_be():
    kept = np.array([[[1.0, 0.0, 0.5], [1.0, 0.0, 1.0]]])
    lost = np.array([[[0.0, 0.2, 0.1], [0.0, 0.4, 0.0]]])
    passages = Passages(10, 25, np.full((1, 2, 3), 0.5), lost, kept)
    first, second = passages.left_out()
    assert (first.start, first.end, first.heads_reading) == (10, 20, 0)
    assert first.lost == pytest.approx(0.3)
    assert (second.start, second.end, second.heads_reading) == (20, 25, 2)
    with pytest.raises(ValueError, match="head 2 is not one of 0 to 1"):
        passages.left_out(0, 2)


def test_maps_are_the_matrices_scaled_down(found, whole):
    for (layer, head), picture in found.maps.items():
        mask, weights = whole[layer][0][head], whole[layer][1][head]
        assert (picture.layer, picture.head, picture.pixel, picture.num_tokens) == (layer, head, 5, LENGTH)
        blocks = [x.reshape(90, 5, 90, 5).sum(axis=(1, 3)) for x in (weights, mask, np.tri(LENGTH))]
        np.testing.assert_allclose(picture.attention, blocks[0] / 5, atol=1e-5)
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(picture.kept, blocks[1] / blocks[2], atol=1e-6)


def test_times_are_measured_where_asked(model, found):
    assert found.head_ms.shape == (NUM_LAYERS, NUM_HEADS)
    assert found.sparse_ms.shape == found.dense_ms.shape == (NUM_LAYERS,)
    assert min(found.head_ms.min(), found.sparse_ms.min(), found.dense_ms.min()) > 0
    other = inspect_attention(model, PROMPT, pattern=PATTERNS)
    assert (other.head_ms, other.sparse_ms, other.dense_ms, other.maps) == (None, None, None, {})
    np.testing.assert_array_equal(other.mass, found.mass)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pattern": "p.json"}, "must be a head pattern, ModelPatterns or None"),
        ({"pattern": ModelPatterns(layers=(HEADS,), source="a test")}, "do not fit a model of 2 layers"),
        ({"passage_size": 0}, "passage_size=0 must be at least 1"),
        ({"map_pixels": 0}, "map_pixels=0 must be at least 1"),
        ({"maps": [(0, 4)]}, "layer 0, head 4 is not in a model of 2 layers of 4 heads"),
        ({"implementation": "abacus"}, "is not one of"),
        ({"prompt": []}, "must be a list of at least one token id"),
    ],
)
def test_what_can_not_be_inspected_is_refused(model, changes, sentence):
    prompt = changes.pop("prompt", PROMPT)
    with pytest.raises(ValueError, match=sentence):
        inspect_attention(model, prompt, **changes)


def test_pictures_are_drawn(found, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra plots")
    draw_heat_maps(found, tmp_path / "heads.png")
    draw_head(found, 1, 0, tmp_path / "head.png")
    for name in ("heads.png", "head.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    draw_heat_maps(found, tmp_path / "heads.SVG")
    draw_head(found, 1, 0, tmp_path / "head.pdf")
    assert b"<svg" in (tmp_path / "heads.SVG").read_bytes()[:1000]
    assert (tmp_path / "head.pdf").read_bytes().startswith(b"%PDF")
    for draw, name in ((draw_heat_maps, "heads.txt"), (lambda *where: draw_head(found, 1, 0, where[1]), "head")):
        with pytest.raises(ValueError, match="a picture's name ends in one of"):
            draw(found, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(ValueError, match="the map of layer 1, head 1 was not computed"):
        draw_head(found, 1, 1, tmp_path / "other.png")


def test_without_matplotlib_a_sentence_says_what_to_install(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'minference-jax\[plots\]'"):
        draw_heat_maps(found, tmp_path / "heads.png")

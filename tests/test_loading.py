"""`load`: from a name or a path, and patterns of any kind, to a model that reads and answers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import pytest
from small_models import CONTEXT, NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import (
    DEFAULT_PATTERN,
    AShape,
    Dense,
    ModelPatterns,
    TileTable,
    convert_model,
    load,
    load_parameters,
    loading,
    uniform_patterns,
    write_patterns,
)
from minference_jax.generate import LanguageModel
from minference_jax.kernels.tiles import TileConfig
from minference_jax.models import linear_of, quantize_linear
from minference_jax.tile_table import TileEntry, write_tiles

WIDE = TileEntry(device="cpu", implementation="xla", head_dim=8, dtype="float32", tiles=TileConfig(block_q=128))
MIXED = ModelPatterns(layers=((AShape(sink_size=2, window_size=4), *[Dense()] * 3),) * NUM_LAYERS, source="a test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint")
    write_patterns(MIXED, place / "patterns.json")
    return convert_model(folder, place / "model", patterns=place / "patterns.json")


def test_folder_and_checkpoint_give_the_same_model(folder, checkpoint):
    ours, theirs = load(checkpoint), load(str(folder))
    prompt = ours.encode("It is a truth")
    assert prompt == theirs.encode("It is a truth")
    assert ours.stop_tokens == theirs.stop_tokens == {256}
    assert ours.config.max_length == CONTEXT
    logits = [model.prefill(prompt, attention="dense").logits for model in (ours, theirs)]
    np.testing.assert_array_equal(*logits)


def test_without_patterns_every_head_has_the_documented_default(folder):
    assert load(folder).patterns == uniform_patterns(NUM_LAYERS, NUM_HEADS, DEFAULT_PATTERN)


def test_checkpoint_brings_its_own_patterns_and_the_callers_come_first(checkpoint):
    assert load(checkpoint).patterns == MIXED
    assert load(checkpoint, patterns=Dense()).patterns == uniform_patterns(NUM_LAYERS, NUM_HEADS, Dense())


def test_patterns_may_be_a_file_or_data(folder, tmp_path):
    write_patterns(MIXED, tmp_path / "mixed.json")
    for patterns in (tmp_path / "mixed.json", str(tmp_path / "mixed.json"), MIXED):
        assert load(folder, patterns=patterns).patterns == MIXED


def test_patterns_that_do_not_fit_are_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_parameters", None)
    with pytest.raises(ValueError, match="do not fit a model of 2 layers of 4 heads"):
        load(folder, patterns=uniform_patterns(NUM_LAYERS + 1, NUM_HEADS))
    with pytest.raises(ValueError, match="patterns=7 must be a path, ModelPatterns, a head pattern or None"):
        load(folder, patterns=7)


def test_dtype_is_that_of_the_model(folder):
    assert load(folder, dtype="bfloat16").model.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype='int8' must be None or one of"):
        load(folder, dtype="int8")


def test_linear_layers_are_8_bit_where_asked_for(folder):
    exact, fast = load(folder), load(folder, linear="fp8")
    assert (linear_of(exact.model), linear_of(fast.model)) == (None, "fp8")
    prompt = exact.encode("It is a truth")
    expected = LanguageModel(quantize_linear(exact.model)).prefill(prompt, attention="dense").logits
    np.testing.assert_array_equal(fast.prefill(prompt, attention="dense").logits, expected)
    assert np.abs(expected - exact.prefill(prompt, attention="dense").logits).max() > 0


def test_a_weight_is_let_go_when_its_8_bit_form_is_there(folder):
    begun, held = set(), []

    def note(done, total, name):
        if name in begun:
            return
        begun.add(name)
        wide = [x for x in jax.live_arrays() if x.shape == (NUM_LAYERS, 32, 48) and x.dtype == jnp.float16]
        held.append(len(wide))  # gate_proj and up_proj, of this dtype in this test alone

    load(folder, dtype="float16", linear="fp8", progress=note)
    assert {"layers.mlp.gate_proj.kernel", "layers.mlp.up_proj.kernel"} <= begun
    assert max(held) == 1


def test_8_bit_linear_layers_do_not_go_with_a_mesh(folder):
    with pytest.raises(ValueError, match="linear='fp8' does not go with a mesh"):
        load_parameters(folder, linear="fp8", mesh=jax.make_mesh((1,), ("model",)))


def test_another_kind_of_linear_layers_is_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_parameters", None)
    with pytest.raises(ValueError, match="linear='int3' must be \"fp8\", or None"):
        load(folder, linear="int3")


def test_folder_without_tokenizer_reads_token_ids(tmp_path):
    model = load(write_model(tmp_path / "ids", tokenizer=False))
    assert model.tokenizer is None
    assert model.generate([3, 4, 5], attention="dense", max_new_tokens=2)[0].text is None


def test_default_model_is_kept_in_the_users_cache_or_where_asked(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "fetch_default_model", lambda cache, progress: asked.append(cache) or folder)
    load()
    load(cache_dir=tmp_path)
    assert asked == [platformdirs.user_cache_dir("minference-jax", appauthor=False), tmp_path]


def test_cache_dir_has_no_meaning_for_other_models(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cache_dir=.* is for the default model only"):
        load(folder, cache_dir=tmp_path)


def test_tiles_are_those_that_are_given_else_those_that_the_user_has_stored(folder, tmp_path, monkeypatch):
    stored, given = tmp_path / "config" / "tiles.json", tmp_path / "given.json"
    monkeypatch.setattr(loading, "default_tiles_file", lambda: stored)
    assert load(folder).tiles == TileTable()
    write_tiles(stored, TileTable((WIDE,)))
    assert load(folder).tiles == TileTable((WIDE,))
    assert load(folder, tiles=TileTable()).tiles == TileTable()
    write_tiles(given, TileTable((replace(WIDE, head_dim=32),)))
    for tiles in (given, str(given)):
        assert load(folder, tiles=tiles).tiles == TileTable((replace(WIDE, head_dim=32),))


def test_tiles_that_make_no_sense_are_refused_before_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_parameters", None)
    (tmp_path / "tiles.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of tile sizes"):
        load(folder, tiles=tmp_path / "tiles.json")
    with pytest.raises(ValueError, match="tiles=7 must be a path, a TileTable or None"):
        load(folder, tiles=7)
    with pytest.raises(FileNotFoundError):
        load(folder, tiles=tmp_path / "nothing.json")
    monkeypatch.setattr(loading, "default_tiles_file", lambda: tmp_path / "tiles.json")
    with pytest.raises(ValueError, match="not a file of tile sizes"):
        load(folder)


def test_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing")


def test_progress_is_told_of_every_byte(folder):
    calls = []
    load(folder, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)

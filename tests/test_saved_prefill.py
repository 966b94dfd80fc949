"""A prefill that is saved and loaded answers as before; anything else than such a file is refused in one sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import tiny_models
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minference_jax
from minference_jax import load_prefill, save_prefill
from minference_jax.cache import StreamingLLM
from minference_jax.generate import LanguageModel, PrefillResult, saved
from minference_jax.models import from_parameters, quantize_linear

CONFIG = dataclasses.replace(tiny_models.CASES["default_untied"], num_layers=2)
PROMPTS = [list(range(40)), list(range(20, 45))]


def reader(config=CONFIG, dtype=np.float32, factor=1):
    parameters = tiny_models.tiny_parameters(config)
    return LanguageModel(
        from_parameters(config, {name: (factor * array).astype(dtype) for name, array in parameters.items()})
    )


@pytest.fixture(scope="module")
def model():
    return reader()


@pytest.fixture(scope="module")
def prefilled(model):
    return model.prefill(PROMPTS, attention="dense")


@pytest.fixture
def path(model, prefilled, tmp_path):
    save_prefill(prefilled, tmp_path / "prefix.safetensors", model)
    return tmp_path / "prefix.safetensors"


def contents(path):
    with safe_open(path, framework="np") as file:
        return load_file(path), dict(file.metadata())


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def test_a_loaded_prefill_is_answered_and_extended_as_the_saved_one(model, prefilled, path):
    anew = reader()
    loaded = load_prefill(path, anew)
    assert loaded.cache.length.tolist() == [40, 25]
    assert anew.complete(loaded, max_new_tokens=6) == model.complete(prefilled, max_new_tokens=6)
    more = [[5, 6, 7], [8]]
    np.testing.assert_array_equal(anew.extend(loaded, more).logits, model.extend(prefilled, more).logits)


def test_only_what_was_written_is_stored_and_everything_is_whole(prefilled, path):
    arrays, metadata = contents(path)
    assert arrays["k"].shape == (2, 2, 40, 2, 8)
    assert json.loads(metadata["tokens"]) == [40, 25]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(arrays["v"], prefilled.cache.v[:, :, :40])


def test_bfloat16_and_density_come_back_bit_for_bit(tmp_path):
    narrow = reader(dtype=jnp.bfloat16)
    read = narrow.prefill(PROMPTS, attention="dense")
    rng = np.random.default_rng(3)
    noise = jnp.asarray(rng.integers(0, 2**16, read.cache.k.shape, np.uint16)).view(jnp.bfloat16)  # with NaN and -0
    density = jnp.asarray(rng.random((2, 2, 4), np.float32))
    read = PrefillResult(read.logits, read.cache._replace(k=noise), density)
    save_prefill(read, tmp_path / "x", narrow)
    loaded = load_prefill(tmp_path / "x", narrow)
    assert loaded.cache.k.dtype == jnp.bfloat16
    for pair in ((loaded.cache.k, read.cache.k), (loaded.cache.v, read.cache.v)):
        ours, theirs = (np.asarray(array) for array in pair)
        np.testing.assert_array_equal(bits(ours[:, :, :40]), bits(theirs[:, :, :40]))
    np.testing.assert_array_equal(loaded.density, density)
    np.testing.assert_array_equal(loaded.logits, read.logits)


@pytest.mark.parametrize("kv_cache", ["int8", "fp8", "host", StreamingLLM(sink_size=5, recent_size=20), "snapkv"])
def test_what_other_policies_keep_comes_back_bit_for_bit(model, tmp_path, kv_cache):
    read = model.prefill(PROMPTS, attention="dense", kv_cache=kv_cache)
    save_prefill(read, tmp_path / "x", model)
    arrays, metadata = contents(tmp_path / "x")
    assert metadata["kv_cache"] == (kv_cache if kv_cache in ("int8", "fp8", "host") else "kept")
    slots = 40 if isinstance(kv_cache, str) else 25
    assert {array.shape[2] for array in arrays.values() if array.ndim > 3} == {slots}
    loaded = load_prefill(tmp_path / "x", model)
    assert jax.tree.structure(loaded) == jax.tree.structure(read)
    for ours, theirs in zip(jax.tree.leaves(loaded.cache), jax.tree.leaves(read.cache), strict=True):
        assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)
        if theirs.ndim > 2:
            axis = 1 if kv_cache == "host" else 2  # of slots
            ours, theirs = (np.take(np.asarray(x), range(slots), axis) for x in (ours, theirs))
        np.testing.assert_array_equal(bits(ours), bits(theirs))
    more = [[5, 6, 7], [8]]
    np.testing.assert_array_equal(model.extend(loaded, more).logits, model.extend(read, more).logits)
    assert model.complete(loaded, max_new_tokens=3) == model.complete(read, max_new_tokens=3)


def test_a_prefill_in_chunks_is_saved_without_the_room_behind_it(tmp_path):
    longer = reader(dataclasses.replace(CONFIG, max_position_embeddings=512))
    read = longer.prefill([*range(60)] * 3, attention="dense", chunk_size=128, kv_cache="int8")
    assert read.cache.capacity == 256
    save_prefill(read, tmp_path / "x", longer)
    assert contents(tmp_path / "x")[0]["k_scale"].shape == (2, 1, 180, 2)
    loaded = load_prefill(tmp_path / "x", longer)
    np.testing.assert_allclose(longer.extend(loaded, [5, 6]).logits, longer.extend(read, [5, 6]).logits, atol=1e-5)


def test_what_was_read_on_behind_another_cache_is_not_saved(model, tmp_path):
    read = model.extend(model.prefill(PROMPTS, attention="dense", kv_cache="int8"), [[5], [6]])
    with pytest.raises(ValueError, match="read on behind a cache that is not plain can't be saved: save it before"):
        save_prefill(read, tmp_path / "x", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"factor": 2}, "was saved from another model: its weights"),
        ({"config": dataclasses.replace(CONFIG, rms_norm_eps=1e-3)}, "was saved from another model: its config"),
        ({"dtype": jnp.bfloat16}, "was saved from another model: its weights"),
    ],
)
def test_another_model_is_refused(path, other, message):
    with pytest.raises(ValueError, match=message):
        load_prefill(path, reader(**other))


def test_8_bit_linear_layers_are_another_model(model, prefilled, path, tmp_path):
    fast = LanguageModel(quantize_linear(model.model))
    with pytest.raises(ValueError, match="was saved from another model: its weights"):
        load_prefill(path, fast)
    read = fast.prefill(PROMPTS, attention="dense")
    save_prefill(read, tmp_path / "fast", fast)
    np.testing.assert_array_equal(load_prefill(tmp_path / "fast", fast).logits, read.logits)
    with pytest.raises(ValueError, match="was saved from another model: its weights"):
        load_prefill(tmp_path / "fast", model)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_is_refused(model, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"prefix.safetensors is cut short, damaged or no saved prefill: "):
        load_prefill(path, model)


def test_foreign_files_are_refused(model, path):
    path.write_bytes(b"\x80\x04cposix\nsystem\n" * 40)
    with pytest.raises(ValueError, match="is cut short, damaged or no saved prefill"):
        load_prefill(path, model)
    save_file({"k": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but no saved prefill"):
        load_prefill(path, model)
    with pytest.raises(FileNotFoundError):
        load_prefill(path.with_name("nowhere"), model)


def test_a_flipped_bit_is_noticed(model, path):
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"is damaged: its array . is not as it was saved"):
        load_prefill(path, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "is of version 2, this release reads version 1"),
        ({"kv_cache": "int4"}, "has a cache of the kind 'int4', this release reads plain, host, int8, fp8, kept"),
        ({"kv_cache": "int8"}, "is damaged: it has the arrays k, logits, v"),
        ({"kv_cache": "kept"}, "is damaged: it has the arrays k, logits, v"),
        ({"version": "x"}, "is damaged: its metadata have no version"),
        ({"tokens": "[40, 1000000]"}, "is damaged: its tokens must be numbers from 1 to 128"),
        ({"tokens": "[]"}, "is damaged: its metadata tell no tokens"),
        ({"tokens": "[40, true]"}, "is damaged: its tokens must be numbers"),
        ({"tokens": "[39, 25]"}, "is damaged: its array k is not as it was saved"),
        ({"tokens": "[40, 24]"}, "is damaged: its metadata are not as they were saved"),
        ({"checksums": "{}"}, "is damaged: it has the arrays k, logits, v"),
        ({"checksums": "7"}, "is damaged: its metadata tell no tokens or no checksums"),
    ],
)
def test_metadata_of_newer_or_damaged_files_are_refused(model, path, changes, message):
    arrays, metadata = contents(path)
    save_file(arrays, path, metadata=metadata | changes)
    with pytest.raises(ValueError, match=message):
        load_prefill(path, model)


def test_missing_arrays_are_refused(model, path):
    arrays, metadata = contents(path)
    del arrays["logits"]
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged: it has the arrays k, v"):
        load_prefill(path, model)


def test_a_save_that_fails_leaves_the_file_that_was_there(model, prefilled, path, monkeypatch):
    before = path.read_bytes()

    def killed(arrays, target, metadata):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_prefill(prefilled, path, model)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_prefill_of_another_model_and_a_folder_that_is_not_there_are_refused(model, prefilled, tmp_path):
    other = reader(dataclasses.replace(CONFIG, num_layers=1))
    with pytest.raises(ValueError, match=r"the prefill's k is float32\[2, 2, 40, 2, 8\], this model gives float32\[1"):
        save_prefill(prefilled, tmp_path / "x", other)
    with pytest.raises(OSError, match="x"):
        save_prefill(prefilled, tmp_path / "nowhere" / "x", model)
    with pytest.raises(OSError, match="nowhere"):
        load_prefill(tmp_path / "nowhere", model)
    for run, how in (
        (lambda: save_prefill(prefilled, tmp_path, model), "written"),
        (lambda: load_prefill(tmp_path, model), "read"),
    ):
        with pytest.raises(OSError, match=f"{tmp_path} can't be {how}: it is no file"):
            run()


def test_the_names_are_public():
    assert {"save_prefill", "load_prefill", "PrefillResult"} <= set(minference_jax.__all__)
    assert minference_jax.PrefillResult is PrefillResult
    assert jax.tree.leaves(PrefillResult(1, 2, None)) == [1, 2]

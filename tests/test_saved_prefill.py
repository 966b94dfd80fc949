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
        ({"version": "x"}, "is damaged: its metadata have no version"),
        ({"tokens": "[40, 1000000]"}, "is damaged: its tokens must be numbers from 1 to 128"),
        ({"tokens": "[]"}, "is damaged: its metadata tell no tokens"),
        ({"tokens": "[40, true]"}, "is damaged: its tokens must be numbers"),
        ({"tokens": "[39, 25]"}, "is damaged: its array k is not as it was saved"),
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
    with pytest.raises(ValueError, match=r"the prefill's k is float32\[2, 2, 128, 2, 8\], this model gives float32\[1"):
        save_prefill(prefilled, tmp_path / "x", other)
    with pytest.raises(OSError, match="x"):
        save_prefill(prefilled, tmp_path / "nowhere" / "x", model)


def test_the_names_are_public():
    assert {"save_prefill", "load_prefill", "PrefillResult"} <= set(minference_jax.__all__)
    assert minference_jax.PrefillResult is PrefillResult
    assert jax.tree.leaves(PrefillResult(1, 2, None)) == [1, 2]

"""Models that are damaged, incomplete or not what they say: refused in one sentence; what was there stays as it was."""

import json
import shutil

import numpy as np
import pytest
import tiny_chatglm
from family_folders import CASES, write_family
from safetensors.numpy import load_file, save_file

from minference_jax.convert.checkpoint import convert_model, load_parameters
from minference_jax.convert.hf_folder import INDEX_FILE

SHARD = "model-00002-of-00003.safetensors"


def truncated_shard(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def empty_shard(folder):
    (folder / SHARD).write_bytes(b"")


def missing_shard(folder):
    (folder / SHARD).unlink()


def change_tensor(folder, change):
    weights = load_file(folder / SHARD)
    name = next(name for name, array in weights.items() if array.ndim == 2)
    weights[name] = np.ascontiguousarray(change(weights[name]))
    save_file(weights, folder / SHARD)


def integers(folder):
    change_tensor(folder, lambda array: array.astype(np.int8))


def doubles(folder):
    change_tensor(folder, lambda array: array.astype(np.float64))


def turned_tensor(folder):
    change_tensor(folder, lambda array: array.T)


def tensor_with_a_row_too_many(folder):
    change_tensor(folder, lambda array: np.concatenate([array, array[:1]]))


def tensor_of_another_rank(folder):
    change_tensor(folder, np.ravel)


def extra_tensor(folder):
    weights = load_file(folder / SHARD) | {"model.layers.0.extra.weight": np.zeros(2, np.float32)}
    save_file(weights, folder / SHARD)
    change_index(folder, {"model.layers.0.extra.weight": SHARD})


def tensor_that_the_index_does_not_know(folder):
    save_file(load_file(folder / SHARD) | {"surprise": np.zeros(2, np.float32)}, folder / SHARD)


def change_index(folder, places):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] |= places
    (folder / INDEX_FILE).write_text(json.dumps(index))


def index_that_leaves_the_folder(folder):
    (folder / SHARD).rename(folder.parent / SHARD)
    change_index(folder, dict.fromkeys(load_file(folder.parent / SHARD), f"../{SHARD}"))


def index_of_numbers(folder):
    change_index(folder, {"model.norm.weight": 2})


def change_config(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))


def config_of_another_family(folder):
    change_config(folder, CASES["phi3"])


def config_of_a_family_with_more_norms(folder):
    change_config(folder, CASES["glm4"])


def config_of_a_smaller_model(folder):
    change_config(folder, CASES["qwen3"] | {"num_hidden_layers": 2})


def config_of_a_larger_model(folder):
    change_config(folder, CASES["qwen3"] | {"num_hidden_layers": 4})


def config_with_other_heads(folder):
    change_config(folder, CASES["qwen3"] | {"num_key_value_heads": 1})


def config_with_another_vocabulary(folder):
    change_config(folder, CASES["qwen3"] | {"vocab_size": 64})


def config_that_ties_what_is_not_tied(folder):
    change_config(folder, CASES["qwen3"] | {"tie_word_embeddings": True})


def config_of_an_unknown_family(folder):
    change_config(folder, CASES["qwen3"] | {"model_type": "mamba"})


DAMAGES = {
    truncated_shard: "model-00002-of-00003.safetensors is cut short",
    empty_shard: "is cut short or not a safetensors file: 0 bytes",
    missing_shard: "names the shard model-00002-of-00003.safetensors, which is missing",
    integers: "holds tensors of dtype I8; supported: F32, F16, BF16",
    doubles: "holds tensors of dtype F64; supported: F32, F16, BF16",
    turned_tensor: "misshapen: ",
    tensor_with_a_row_too_many: "misshapen: ",
    tensor_of_another_rank: "misshapen: ",
    extra_tensor: "unmatched: model.layers.0.extra.weight",
    tensor_that_the_index_does_not_know: "surprise is in model-00002-of-00003.safetensors, not so in the index",
    index_that_leaves_the_folder: "which is outside its folder",
    index_of_numbers: "has no weight_map from tensor names to files",
    config_of_another_family: "missing: model.layers.0.self_attn.qkv_proj.weight",
    config_of_a_family_with_more_norms: "missing: model.layers.2.post_mlp_layernorm.weight",
    config_of_a_smaller_model: "unmatched: model.layers.2.mlp.up_proj.weight",
    config_of_a_larger_model: "missing: model.layers.3.mlp.up_proj.weight",
    config_with_other_heads: "misshapen: model.layers.0.self_attn.k_proj.weight is [32, 32], needs [16, 32]",
    config_with_another_vocabulary: "misshapen: model.embed_tokens.weight is [61, 32], needs [64, 32]",
    config_that_ties_what_is_not_tied: "unmatched: lm_head.weight",
    config_of_an_unknown_family: "model_type='mamba' is not supported; supported: llama, ",
}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A whole folder, and a checkpoint of it."""
    base = tmp_path_factory.mktemp("originals")
    folder = write_family(base / "hf", CASES["qwen3"], shards=3)
    return folder, convert_model(folder, base / "checkpoint")


def assert_refused(source, tmp_path, old, sentence):
    """By conversion to a new place, over a checkpoint, and by loading; nothing is written or changed."""
    destination = tmp_path / "out" / "old"
    shutil.copytree(old, destination)
    before = content(destination)
    for convert in (
        lambda: convert_model(source, tmp_path / "out" / "new"),
        lambda: convert_model(source, destination, overwrite=True),
        lambda: load_parameters(source),
    ):
        with pytest.raises(ValueError, match=r"\w") as error:
            convert()
        assert sentence in str(error.value)
        lines = str(error.value).splitlines()
        assert all(line.startswith(("  missing: ", "  unmatched: ", "  misshapen: ")) for line in lines[1:])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert content(destination) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folder_is_refused_and_the_destination_untouched(originals, tmp_path, damage):
    folder, old = originals
    source = shutil.copytree(folder, tmp_path / "hf")
    damage(source)
    assert_refused(source, tmp_path, old, DAMAGES[damage])


def test_shard_that_shrinks_while_it_is_read_is_refused_and_the_destination_untouched(originals, tmp_path):
    folder, old = originals
    source = shutil.copytree(folder, tmp_path / "hf")
    destination = shutil.copytree(old, tmp_path / "out" / "old")
    before = content(destination)

    def progress(done, total, name):
        for shard in source.glob("*.safetensors"):
            shard.write_bytes(shard.read_bytes()[:5000])

    for name in ("new", "old"):
        with pytest.raises(ValueError, match=r"\.safetensors is cut short: .* needs [0-9]+ bytes, [0-9]+ are there"):
            convert_model(source, tmp_path / "out" / name, overwrite=True, progress=progress)
        shutil.copytree(folder, source, dirs_exist_ok=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert content(destination) == before


def test_damaged_chatglm_folder_is_refused_and_the_destination_untouched(originals, tmp_path):
    source = tiny_chatglm.write_folder(tmp_path / "chatglm")
    weights = load_file(source / "model.safetensors")
    del weights["transformer.encoder.layers.1.self_attention.query_key_value.bias"]
    save_file(weights, source / "model.safetensors")
    assert_refused(source, tmp_path, originals[1], "missing: model.layers.1.self_attn.k_proj.bias")


@pytest.mark.parametrize("kind", ["gguf", "whl"])
def test_damaged_gguf_file_is_refused_and_the_destination_untouched(make, originals, tmp_path, kind):
    source = make.gguf(tmp_path / "m.gguf")
    source.write_bytes(source.read_bytes()[:-1000])
    if kind == "whl":
        source.rename(tmp_path / "m.whl")  # which is no archive
    assert_refused(tmp_path / f"m.{kind}", tmp_path, originals[1], f"m.{kind}")

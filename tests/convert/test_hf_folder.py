"""Hugging Face folders: what is read from them and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minference_jax.convert.checkpoint import load_config, load_parameters, load_stop_tokens, load_tokenizer
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.hf_weights import WeightError


def assert_equal(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, array in parameters.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(array), expected[name], err_msg=name)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        {"head_dim": 16},
    ],
)
def test_every_hf_weight_is_used_exactly_once(make, expected, tmp_path, shards, changes):
    weights = make.weights(make.CONFIG | changes)
    config, parameters = load_parameters(make.folder(tmp_path / "hf", weights=weights, shards=shards, **changes))
    assert_equal(parameters, expected(weights))
    assert config.head_dim == changes.get("head_dim", 8)


def test_loaded_parameters_make_a_model(make, tmp_path):
    from minference_jax.models import from_parameters

    model = from_parameters(*load_parameters(make.folder(tmp_path / "hf")))
    assert model.config.num_layers == 3


def test_tensors_are_read_when_asked_for(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    source = HuggingFaceFolder(folder)
    assert source.tensors["lm_head.weight"].shape == (48, 32)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    last = max(source._stored, key=lambda name: source._stored[name].start)
    with pytest.raises(ValueError, match="cut short"):
        source.read(last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_dtype_is_kept(make, tmp_path, dtype):
    stored = make.BF16 if dtype == "bfloat16" else np.dtype(dtype)
    _, parameters = load_parameters(make.folder(tmp_path / "hf", dtype=stored))
    assert {str(array.dtype) for array in parameters.values()} == {dtype}


def test_mixed_dtypes_become_float32_exactly(make, expected, tmp_path):
    weights = make.weights(make.CONFIG, make.BF16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float16)
    _, parameters = load_parameters(make.folder(tmp_path / "hf", weights=weights))
    assert_equal(parameters, expected({name: array.astype(np.float32) for name, array in weights.items()}))


def test_requested_dtype_rounds_to_nearest(make, expected, tmp_path):
    weights = make.weights(make.CONFIG)
    _, parameters = load_parameters(make.folder(tmp_path / "hf", weights=weights), dtype="bfloat16")
    assert_equal(parameters, expected({name: array.astype(make.BF16) for name, array in weights.items()}))


def test_number_beyond_the_requested_dtype_is_refused(make, tmp_path):
    weights = make.weights(make.CONFIG)
    weights["lm_head.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"lm_head\.kernel holds 1e\+06, which float16 can't"):
        load_parameters(make.folder(tmp_path / "hf", weights=weights), dtype="float16")


def test_unknown_dtype_is_refused(make, tmp_path):
    for dtype in ("int8", "float64", "bf16"):
        with pytest.raises(ValueError, match="must be None or one of float32, float16, bfloat16"):
            load_parameters(make.folder(tmp_path / "hf"), dtype=dtype)


def test_all_weights_that_do_not_fit_are_listed_at_once(make, tmp_path):
    weights = make.weights(make.CONFIG)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.00.extra"] = np.zeros(2, np.float32)
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    weights["model.layers.2.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)
    with pytest.raises(WeightError) as error:
        load_parameters(make.folder(tmp_path / "hf", weights=weights))
    assert error.value.missing == ["model.layers.1.mlp.up_proj.weight"]
    assert error.value.unmatched == [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.00.extra",
        "model.layers.3.mlp.up_proj.weight",
    ]
    assert error.value.misshapen == {"model.layers.2.self_attn.k_proj.weight": ((32, 16), (16, 32))}
    assert isinstance(error.value, ValueError)
    for line in ("unmatched: model.layers.00.extra", "missing: model.layers.1.mlp", "is [32, 16], needs [16, 32]"):
        assert line in str(error.value)


def test_copy_of_a_tied_embedding_is_accepted_and_another_head_is_not(make, tmp_path):
    weights = make.weights(make.CONFIG)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    _, parameters = load_parameters(make.folder(tmp_path / "hf", weights=weights, tie_word_embeddings=True))
    assert "lm_head.kernel" not in parameters
    weights["lm_head.weight"][3, 3] += 1
    with pytest.raises(WeightError, match=r"unmatched: lm_head\.weight"):
        load_parameters(make.folder(tmp_path / "other", weights=weights, tie_word_embeddings=True))


def test_rotary_buffers_of_old_files_are_skipped(make, tmp_path):
    weights = make.weights(make.CONFIG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    load_parameters(make.folder(tmp_path / "hf", weights=weights))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_in_one_sentence(make, tmp_path, name):
    folder = make.folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=f"pickled weights only \\({name}\\), which can run code") as error:
        load_parameters(folder)
    assert "\n" not in str(error.value)


def test_folder_without_weights_or_config_is_refused(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_parameters(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_parameters(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_config_that_is_no_json_object_is_refused(make, tmp_path, content):
    folder = make.folder(tmp_path / "hf")
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_parameters(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b"])
def test_shard_outside_the_folder_is_refused(make, tmp_path, shard):
    folder = make.folder(tmp_path / "hf", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        load_parameters(folder)


def test_missing_shard_is_refused(make, tmp_path):
    folder = make.folder(tmp_path / "hf", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard model-00002-of-00002\.safetensors, which is missing"):
        load_parameters(folder)


def test_index_that_disagrees_with_its_shards_is_refused(make, tmp_path):
    folder = make.folder(tmp_path / "hf", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"disagree: ghost is not in .*; lm_head\.weight is in"):
        load_parameters(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_parameters(folder)


def test_single_file_beside_an_index_is_refused(make, tmp_path):
    folder = make.folder(make.folder(tmp_path / "hf"), shards=2)
    with pytest.raises(ValueError, match="has both"):
        load_parameters(folder)


@pytest.mark.parametrize("kept", [0, 4, 30, 2000, -1])
def test_file_cut_short_is_refused(make, tmp_path, kept):
    path = make.folder(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut short"):
        load_parameters(tmp_path / "hf")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        "x",
    ],
)
def test_damaged_header_is_refused(make, tmp_path, entry):
    folder = make.folder(tmp_path / "hf")
    header = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"damaged|not a safetensors file"):
        load_parameters(folder)


def test_unsupported_dtype_is_refused_by_name(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    save_file({"a": np.zeros(4, np.int32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tensors of dtype I32; supported: F32, F16, BF16"):
        load_parameters(folder)


def test_config_tokenizer_and_stop_tokens_load_without_weights(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    assert load_config(folder).hidden_size == 32
    assert load_tokenizer(folder).eos_token_id == 2
    assert load_stop_tokens(folder) == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_stop_tokens(folder) == (2, 5)


def test_missing_or_broken_tokenizer_is_refused(make, tmp_path):
    folder = make.folder(tmp_path / "hf", tokenizer=False)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be loaded"):
        load_tokenizer(folder)


def test_code_beside_a_tokenizer_is_never_run(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "can't be loaded" in str(error)  # noqa: PT017 - loading without the code is as good
    assert not (tmp_path / "ran").exists()

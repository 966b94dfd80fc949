"""Folders of original ChatGLM checkpoints: read under the names of transformers' glm, and none of their code is run."""

import json

import numpy as np
import pytest
from tiny_chatglm import (
    CONFIG,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    SIZE,
    VOCABULARY,
    chatglm_weights,
    glm_weights,
    write_folder,
)
from transformers import GlmConfig

from minference_jax.convert.chatglm import ChatGLMFolder, read_chatglm_config
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.sources import folder_tokenizer, open_source, source_config


@pytest.fixture
def write(tmp_path):
    """Writes a ChatGLM folder."""
    return lambda **options: write_folder(tmp_path / "chatglm", **options)


@pytest.mark.parametrize("shards", [0, 3])
def test_every_tensor_is_there_under_the_name_and_with_the_rows_of_glm(write, shards):
    weights = glm_weights()
    source = open_source(write(shards=shards))
    assert isinstance(source, ChatGLMFolder)
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: array.shape for name, array in weights.items()
    }
    for name, array in weights.items():
        assert source.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(source.read(name), array, err_msg=name)
    assert [path.suffix for path in source.files] == [".safetensors"] * max(1, shards)
    source.close()


@pytest.mark.parametrize("rows", [(0, None), (0, 0), (3, None), (2, 7), (5, 16), (16, 16)])
def test_rows_of_a_part_are_rows_of_the_fused_tensor(write, rows):
    weights = glm_weights()
    source = ChatGLMFolder(write())
    start, stop = rows
    for part in ("q_proj.weight", "k_proj.weight", "k_proj.bias", "v_proj.weight", "o_proj.weight"):
        name = f"model.layers.1.self_attn.{part}"
        np.testing.assert_array_equal(source.read(name, start, stop), weights[name][start:stop], err_msg=part)


def test_only_the_rows_asked_for_are_read(write, monkeypatch):
    source = ChatGLMFolder(write())
    asked = []
    fromfile = np.fromfile

    def count(path, dtype, count, offset):
        asked.append(count)
        return fromfile(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", count)
    source.read("model.layers.0.self_attn.k_proj.weight")
    source.read("model.layers.0.self_attn.v_proj.weight", 2, 5)
    assert asked == [KV_HEADS * SIZE * HIDDEN * 4, 3 * HIDDEN * 4]


@pytest.mark.parametrize("rows", [(0, 17), (-1, 4), (5, 4), (17, None)])
def test_rows_beyond_a_part_are_refused_and_never_its_neighbours(write, rows):
    source = ChatGLMFolder(write())
    with pytest.raises(ValueError, match=r"rows .* of model\.layers\.0\.self_attn\.k_proj\.weight .* has 16"):
        source.read("model.layers.0.self_attn.k_proj.weight", *rows)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_tensor_with_another_number_of_rows_is_refused(write, kind):
    name = f"transformer.encoder.layers.1.self_attention.query_key_value.{kind}"
    weights = chatglm_weights(glm_weights())
    weights[name] = np.ascontiguousarray(weights[name][:-1])
    with pytest.raises(ValueError, match=rf"query_key_value\.{kind} has shape \[63.*needs 64 rows: 4 heads"):
        ChatGLMFolder(write(weights=weights))


def test_tensor_without_a_place_keeps_its_own_name(write):
    extra = [
        "transformer.encoder.layers.0.self_attention.dense.bias",
        "transformer.encoder.layers.00.mlp.dense_4h_to_h.weight",
        "transformer.prefix_encoder.embedding.weight",
        "vision.x",
    ]
    weights = chatglm_weights(glm_weights()) | {name: np.zeros((2, 2), np.float32) for name in extra}
    source = ChatGLMFolder(write(weights=weights))
    assert source.tensors.keys() - glm_weights().keys() == set(extra)
    assert source.read("vision.x", 1).shape == (1, 2)


def test_tensor_that_already_has_a_name_of_glm_is_refused(write):
    weights = chatglm_weights(glm_weights()) | {"model.norm.weight": np.zeros(HIDDEN, np.float32)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has a name of transformers'"):
        ChatGLMFolder(write(weights=weights))


def test_config_is_that_of_glm(write):
    config = read_chatglm_config(CONFIG)
    assert config == {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "max_position_embeddings": 1048576,
        "hidden_act": "silu",
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 1e8,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "eos_token_id": [269, 272],
        "pad_token_id": 269,
        "torch_dtype": "bfloat16",
    }
    assert json.loads(json.dumps(config)) == config
    folder = write()
    assert source_config(folder) == ChatGLMFolder(folder).config == config


def test_transformers_reads_the_translated_config_alike():
    theirs = GlmConfig(**read_chatglm_config(CONFIG))
    assert theirs.rope_parameters["rope_theta"] == 1e8
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5
    assert (theirs.num_key_value_heads, theirs.head_dim, theirs.attention_bias) == (KV_HEADS, SIZE, True)
    assert theirs.eos_token_id == [269, 272]


def test_config_without_optional_fields_has_the_values_that_chatglm_gives_them():
    optional = {"rope_ratio", "add_qkv_bias", "architectures", "auto_map", "rmsnorm", "post_layer_norm", "vocab_size"}
    config = read_chatglm_config({name: value for name, value in CONFIG.items() if name not in optional})
    assert (config["rope_theta"], config["attention_bias"]) == (10000.0, False)
    config = read_chatglm_config(CONFIG | {"tie_word_embeddings": True, "rope_ratio": 0.5})
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (5000.0, True)
    read_chatglm_config(CONFIG | {"architectures": ["ChatGLMForConditionalGeneration"], "quantization_bit": 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("original_rope", False),
        ("multi_query_attention", False),
        ("pre_seq_len", 128),
        ("quantization_bit", 4),
        ("quantization_config", {"bits": 4}),
        ("rope_ratio", 0),
        ("rope_ratio", None),
        ("rope_ratio", "2"),
        ("layernorm_epsilon", "small"),
        ("add_qkv_bias", "yes"),
        ("hidden_size", 24.0),
        ("kv_channels", True),
        ("num_layers", 0),
        ("num_hidden_layers", 3),
        ("vocab_size", 303),
        ("architectures", ["ChatGLMForSequenceClassification"]),
        ("vision_config", {}),
        ("rope_scaling", {"type": "yarn"}),
        ("model_type", "glm"),
    ],
)
def test_field_that_cannot_be_honoured_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^config\.json: (.*; )?{name}=") as error:
        read_chatglm_config(CONFIG | {name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["multi_query_attention", "original_rope", "kv_channels", "layernorm_epsilon", "seq_length"]
)
def test_missing_field_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^config\.json: {name} is missing"):
        read_chatglm_config({field: value for field, value in CONFIG.items() if field != name})


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"hidden_size is missing; rmsnorm=False .*; pre_seq_len=3 .*; surprise=1 is"):
        read_chatglm_config(CONFIG | {"hidden_size": None, "rmsnorm": False, "pre_seq_len": 3, "surprise": 1})


def test_stretched_positions_of_older_models_are_refused():
    older = CONFIG | {"padded_vocab_size": 65024, "vocab_size": 65024}
    assert read_chatglm_config(older | {"rope_ratio": 1})["rope_theta"] == 10000.0
    with pytest.raises(ValueError, match="rope_ratio=50 is not supported, only 1: ChatGLM2 and ChatGLM3"):
        read_chatglm_config(older | {"rope_ratio": 50})


def test_nothing_in_the_folder_is_run(write, tmp_path):
    folder = write()
    out = tmp_path / "out"
    out.mkdir()
    with_weights = open_source(folder)
    with_weights.load_tokenizer()
    with_weights.save_tokenizer(out)
    source_config(folder)
    folder_tokenizer(folder)
    assert not (tmp_path / "ran").exists()
    assert not list(out.glob("*.py"))


def test_other_folders_are_opened_as_before(make, tmp_path):
    folder = make.folder(tmp_path / "hf")
    assert isinstance(open_source(folder), HuggingFaceFolder)
    assert source_config(folder)["model_type"] == "llama"
    assert folder_tokenizer(folder).eos_token_id == 2
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_source(folder)

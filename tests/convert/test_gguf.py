"""GGUF files, alone and inside archives: what is read from them and what is refused."""

import zipfile

import gguf
import numpy as np
import pytest

from minference_jax.convert.checkpoint import (
    convert_model,
    load_config,
    load_parameters,
    load_stop_tokens,
    load_tokenizer,
)
from minference_jax.convert.gguf_file import GGUFFile
from minference_jax.convert.hf_weights import WeightError
from minference_jax.models.rope import RopeConfig

KINDS = gguf.GGMLQuantizationType


def assert_equal(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, array in parameters.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(array), expected[name], err_msg=name)


def dequantised(weights, kind):
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind) if array.ndim > 1 else array
        for name, array in weights.items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_gives_the_same_parameters_and_config_as_the_folder(make, expected, tmp_path, tied):
    weights = make.weights(make.CONFIG | {"tie_word_embeddings": tied})
    path = make.gguf(tmp_path / "m.gguf", weights=weights, tie_word_embeddings=tied)
    config, parameters = load_parameters(path)
    assert_equal(parameters, expected(weights))
    assert config == load_config(make.folder(tmp_path / "hf", weights=weights, tie_word_embeddings=tied))


def test_qwen2_rows_are_not_reordered(make, expected, tmp_path):
    weights = make.weights(make.CONFIG | {"model_type": "qwen2"})
    config, parameters = load_parameters(make.gguf(tmp_path / "m.gguf", weights=weights, model_type="qwen2"))
    assert_equal(parameters, expected(weights))
    assert config.qkv_bias
    assert not config.o_bias


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_1])
def test_quantised_tensors_become_float32_exactly(make, expected, tmp_path, kind):
    weights = make.weights(make.CONFIG)
    _, parameters = load_parameters(make.gguf(tmp_path / "m.gguf", weights=weights, kinds=kind))
    assert_equal(parameters, expected(dequantised(weights, kind)))


@pytest.mark.parametrize(("kind", "dtype"), [(KINDS.F16, "float16"), (KINDS.BF16, "bfloat16")])
def test_half_precision_tensors_are_read_as_they_are(make, tmp_path, kind, dtype):
    with_kind = GGUFFile(make.gguf(tmp_path / "m.gguf", kinds=kind))
    assert with_kind.tensors["output.weight"].dtype == dtype
    exact = dequantised(make.weights(make.CONFIG), kind)["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(with_kind.read("output.weight").astype(np.float32), exact)
    _, parameters = load_parameters(tmp_path / "m.gguf")
    assert {str(array.dtype) for array in parameters.values()} == {"float32"}  # norms are float32


def test_numbers_of_the_metadata_are_the_decimals_that_were_meant(make, tmp_path):
    config = load_config(make.gguf(tmp_path / "m.gguf", rms_norm_eps=1e-6, rope_theta=500000.0))
    assert (config.rms_norm_eps, config.rope.rope_theta) == (1e-6, 500000.0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("suffix", ["whl", "zip"])
def test_gguf_is_read_inside_an_archive(make, expected, tmp_path, compression, suffix):
    weights = make.weights(make.CONFIG)
    path = make.gguf(tmp_path / "m.gguf", weights=weights)
    archive = tmp_path / f"package.{suffix}"
    with zipfile.ZipFile(archive, "w", compression) as members:
        members.writestr("package/__init__.py", "raise SystemExit('executed')")
        members.write(path, "package/model.gguf")
    path.unlink()
    assert_equal(load_parameters(archive)[1], expected(weights))
    assert load_tokenizer(archive).eos_token_id == 2


def test_archive_with_several_models_asks_which_one(make, tmp_path):
    archive = tmp_path / "two.zip"
    with zipfile.ZipFile(archive, "w") as members:
        members.write(make.gguf(tmp_path / "a.gguf"), "a.gguf")
        members.write(make.gguf(tmp_path / "b.gguf", num_hidden_layers=2), "in/b.gguf")
    with pytest.raises(ValueError, match=r"2 GGUF members \(a.gguf, in/b.gguf\): name one as .*two.zip/a.gguf"):
        load_parameters(archive)
    assert load_config(archive / "in/b.gguf").num_layers == 2
    with pytest.raises(ValueError, match=r"no member c\.gguf; its GGUF members: a\.gguf"):
        load_config(archive / "c.gguf")


def test_archive_without_a_model_and_broken_archives_are_refused(make, tmp_path):
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as members:
        members.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="0 GGUF members"):
        load_parameters(tmp_path / "none.zip")
    (tmp_path / "broken.whl").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="can't be unpacked"):
        load_parameters(tmp_path / "broken.whl")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as members:
        members.write(make.gguf(tmp_path / "m.gguf"), "m.gguf")
    content = bytearray((tmp_path / "damaged.zip").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.raises(ValueError, match="can't be unpacked"):
        load_parameters(tmp_path / "damaged.zip")


def test_file_cut_short_anywhere_is_refused(make, tmp_path):
    whole = make.gguf(tmp_path / "m.gguf").read_bytes()
    for kept in (5, 20, 100, 1000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "short.gguf").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut short"):
            load_parameters(tmp_path / "short.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(60), "is not a GGUF file"),
        (b"", "cut short"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(60), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "little-endian"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_parameters(tmp_path / "m.gguf")


def test_random_damage_in_the_header_never_gives_another_error(make, tmp_path):
    whole = make.gguf(tmp_path / "m.gguf", num_hidden_layers=1).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(len(whole) // 8)] = rng.integers(256)
        (tmp_path / "damaged.gguf").write_bytes(content)
        try:
            load_config(tmp_path / "damaged.gguf")
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported"),
        ({"general.type": "adapter"}, "holds a 'adapter', not a model"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window is not a key"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, "differs between layers"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 is not supported"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length=16 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"llama.rope.scaling.type": "linear"}, "needs rope.scaling.factor"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "original_context_length"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor=0.5"),
        ({"llama.block_count": "3"}, "llama.block_count has the wrong type: str"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count=0 must be positive"),
        ({"tokenizer.ggml.bos_token_id": "<s>"}, "tokenizer.ggml.bos_token_id has the wrong type: str"),
        ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token has the wrong type: int"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused_by_name(make, tmp_path, metadata, message):
    with pytest.raises(ValueError, match=r"m\.gguf") as error:
        load_parameters(make.gguf(tmp_path / "m.gguf", metadata=metadata))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            RopeConfig(rope_type="linear", factor=4.0),
        ),
        ({"llama.rope.scale_linear": 2.0}, RopeConfig(rope_type="linear", factor=2.0)),
        ({"llama.rope.scaling.factor": 2.0}, RopeConfig(rope_type="linear", factor=2.0)),
        ({"llama.rope.scaling.type": "none"}, RopeConfig()),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
                "llama.rope.scaling.finetuned": True,
            },
            RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        ),
    ],
)
def test_rope_scaling_of_the_metadata_is_read(make, tmp_path, metadata, rope):
    assert load_config(make.gguf(tmp_path / "m.gguf", metadata=metadata)).rope == rope


def llama3_factors(factor, theta, head_dim):
    """What llama.cpp's conversion of Llama 3.1 stores, one pair after the other."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        out.append(
            1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequency_factors_of_llama3_become_their_settings(make, tmp_path, factor):
    extra = {"rope_freqs.weight": llama3_factors(factor, 500000.0, 64)}
    changes = {"head_dim": 64, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = load_config(make.gguf(tmp_path / "m.gguf", extra=extra, rope_theta=500000.0, **changes))
    assert config.rope == RopeConfig(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def test_other_frequency_factors_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"frequency factors in rope_freqs\.weight"):
        load_config(make.gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.full(4, 3, np.float32)}))


def test_tensors_that_do_not_fit_are_listed(make, tmp_path):
    weights = make.weights(make.CONFIG)
    del weights["model.norm.weight"]
    with pytest.raises(WeightError) as error:
        load_parameters(
            make.gguf(tmp_path / "m.gguf", weights=weights, extra={"blk.0.attn_x.weight": np.ones(2, "f4")})
        )
    assert error.value.missing == ["model.norm.weight"]
    assert error.value.unmatched == ["blk.0.attn_x.weight"]


def test_integer_tensors_are_refused_by_type(make, tmp_path):
    with pytest.raises(ValueError, match=r"odd\.weight has type I32, which is not supported"):
        load_parameters(make.gguf(tmp_path / "m.gguf", extra={"odd.weight": np.ones(32, np.int32)}))


def test_end_of_turn_tokens_stop_too(make, tmp_path):
    path = make.gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 7})
    assert load_stop_tokens(path) == (2, 7)
    assert load_stop_tokens(convert_model(path, tmp_path / "ck")) == (2, 7)

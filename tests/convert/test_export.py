"""Export to Hugging Face folders: the same bits come back, and transformers loads them as its own."""

import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chatglm
from comparing import assert_same, names_in
from family_folders import CASES, hf_weights, write_family
from goldens.tiny_models import tiny_prompt
from safetensors import safe_open
from safetensors.numpy import load_file
from tolerances import LOGITS

from minference_jax.cache import init_cache
from minference_jax.convert import export
from minference_jax.convert.checkpoint import convert_model, load_parameters, load_stop_tokens, load_tokenizer
from minference_jax.convert.export import export_model
from minference_jax.convert.store import TensorStore
from minference_jax.models import from_parameters

WITH_TORCH = ("llama", "qwen3_tied_bias", "phi3_longrope_long", "phi3_partial", "glm", "glm4", "mistral", "qwen2")


@pytest.fixture
def checkpoint(tmp_path):
    return convert_model(write_family(tmp_path / "hf", CASES["phi3"]), tmp_path / "checkpoint")


@pytest.mark.parametrize("name", CASES)
def test_converted_exported_and_converted_again_a_model_is_the_same_to_the_bit(tmp_path, name):
    source = write_family(tmp_path / "hf", CASES[name])
    first = convert_model(source, tmp_path / "first")
    exported = export_model(first, tmp_path / "exported")
    assert_same(load_file(exported / "model.safetensors"), hf_weights(CASES[name]))
    second = convert_model(exported, tmp_path / "second")
    (config, parameters), (other, others) = load_parameters(first), load_parameters(second)
    assert config == other
    assert_same(parameters, others)


def test_gguf_file_is_exported_as_the_model_that_it_holds(make, tmp_path):
    weights = make.weights(make.CONFIG)
    first = convert_model(make.gguf(tmp_path / "m.gguf", weights=weights), tmp_path / "first")
    exported = export_model(first, tmp_path / "exported")
    assert_same(load_file(exported / "model.safetensors"), weights)
    assert load_tokenizer(exported)("#$%")["input_ids"] == load_tokenizer(first)("#$%")["input_ids"]
    assert load_parameters(exported)[0] == load_parameters(first)[0]


@pytest.mark.parametrize("limit", [1, 5000, 20000])
def test_shards_have_no_more_than_they_may_and_a_right_index(checkpoint, tmp_path, limit):
    exported = export_model(checkpoint, tmp_path / "exported", shard_bytes=limit)
    weights = hf_weights(CASES["phi3"])
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert names_in(exported) == ["config.json", *shards, "model.safetensors.index.json"]
    sizes = []
    for shard in shards:
        with safe_open(exported / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(name for name, place in index["weight_map"].items() if place == shard)
            sizes.append([weights[name].nbytes for name in file.keys()])  # noqa: SIM118 - not a dict
    assert all(len(each) == 1 or sum(each) <= limit for each in sizes)
    assert all(sum(one) + sum(following) > limit for one, following in itertools.pairwise(sizes))
    assert len(shards) > 5
    assert_same(load_parameters(exported)[1], load_parameters(checkpoint)[1])


def test_small_tensors_are_read_many_at_once(checkpoint, tmp_path, monkeypatch):
    asked, read = [], TensorStore.read

    def noted(self, keys):
        asked.append(list(keys))
        return read(self, keys)

    monkeypatch.setattr(TensorStore, "read", noted)
    exported = export_model(checkpoint, tmp_path / "exported")
    assert len(asked) == 1
    asked.clear()
    monkeypatch.setattr(export, "PART_BYTES", 20000)
    assert_same(
        load_file(export_model(checkpoint, tmp_path / "again") / "model.safetensors"),
        load_file(exported / "model.safetensors"),
    )
    assert 1 < len(asked) < 10
    assert sum(len(keys) for keys in asked) == len({key for keys in asked for key in keys}) == 30


def test_progress_counts_every_byte_once(checkpoint, tmp_path):
    calls = []
    export_model(checkpoint, tmp_path / "exported", dtype="bfloat16", progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    assert set(totals) == {sum(array.nbytes for array in hf_weights(CASES["phi3"]).values()) / 2} == {done[-1]}
    assert list(done) == sorted(done)
    assert sorted(names) == sorted(hf_weights(CASES["phi3"]))


def test_dtype_can_be_changed_and_the_config_says_which(tmp_path):
    source = write_family(tmp_path / "hf", CASES["glm"] | {"torch_dtype": "float16"}, dtype=np.float16)
    checkpoint = convert_model(source, tmp_path / "checkpoint")
    for dtype, expected in ((None, "float16"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        exported = export_model(checkpoint, tmp_path / f"as_{dtype}", dtype=dtype)
        config = json.loads((exported / "config.json").read_text())
        assert (config["dtype"], "torch_dtype" in config) == (expected, False)
        assert {array.dtype.name for array in load_file(exported / "model.safetensors").values()} == {expected}
        assert_same(load_parameters(exported)[1], load_parameters(source, dtype=dtype)[1])


def test_number_that_the_dtype_cannot_hold_is_refused_and_leaves_nothing(make, tmp_path):
    weights = make.weights(make.CONFIG)
    weights["lm_head.weight"][0, 0] = 1e6
    checkpoint = convert_model(make.folder(tmp_path / "hf", weights=weights), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"lm_head\.kernel holds 1e\+06, which float16 can't"):
        export_model(checkpoint, tmp_path / "out" / "exported", dtype="float16")
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["qwen3_tied_bias", "glm_no_bias_tied", "phi3_partial"])
def test_tied_model_has_no_lm_head(tmp_path, name):
    exported = export_model(
        convert_model(write_family(tmp_path / "hf", CASES[name]), tmp_path / "checkpoint"), tmp_path / "exported"
    )
    assert "lm_head.weight" not in load_file(exported / "model.safetensors")
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is True


def test_tokenizer_and_generation_config_come_along_and_nothing_of_ours(make, tmp_path):
    source = make.folder(tmp_path / "hf")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (source / "evil.py").write_text("raise SystemExit")
    exported = export_model(convert_model(source, tmp_path / "checkpoint"), tmp_path / "exported")
    assert names_in(exported) == [name for name in names_in(source) if name != "evil.py"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    assert load_stop_tokens(exported) == (2, 5)
    assert load_tokenizer(exported)("text")["input_ids"] == load_tokenizer(source)("text")["input_ids"]


def test_exported_config_names_no_code(tmp_path):
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    source = write_family(tmp_path / "hf", CASES["phi3"] | {"auto_map": code})
    exported = export_model(convert_model(source, tmp_path / "checkpoint"), tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text()) == CASES["phi3"] | {"dtype": "float32"}


def test_existing_destination_is_refused_and_left_as_it_is(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "link", "checkpoint"):
        with pytest.raises(ValueError, match="already exists; choose another"):
            export_model(checkpoint, tmp_path / name)
    assert names_in(tmp_path / "mine") == ["a.txt"]
    load_parameters(checkpoint)


def test_destination_that_appears_meanwhile_is_left_as_it_is(checkpoint, tmp_path):
    destination = tmp_path / "out" / "exported"

    def progress(*call):
        destination.mkdir(exist_ok=True)
        (destination / "a.txt").write_text("mine")

    with pytest.raises(ValueError, match="appeared during the export; it is left as it is"):
        export_model(checkpoint, destination, progress=progress)
    assert names_in(destination) == ["a.txt"]
    assert names_in(destination.parent) == ["exported"]


def test_folder_that_is_no_checkpoint_is_refused(tmp_path):
    for source in (write_family(tmp_path / "hf", CASES["llama"]), tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a minference-jax checkpoint: convert the model first") as error:
            export_model(source, tmp_path / "out" / "exported")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_shards_of_no_size_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes=0 must be at least 1"):
        export_model(checkpoint, tmp_path / "exported", shard_bytes=0)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failure_in_the_middle_leaves_nothing(checkpoint, tmp_path, error):
    def progress(done, total, name):
        if done > total // 2:
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        export_model(checkpoint, tmp_path / "out" / "exported", shard_bytes=5000, progress=progress)
    assert names_in(tmp_path / "out") == []


def test_damaged_checkpoint_is_refused_and_leaves_nothing(checkpoint, tmp_path):
    shutil.rmtree(next((checkpoint / "weights").glob("layers_*")))
    with pytest.raises(ValueError, match="are damaged"):
        export_model(checkpoint, tmp_path / "out" / "exported")
    assert not (tmp_path / "out").exists()


def our_logits(path, prompt):
    config, parameters = load_parameters(path, dtype="float32")
    cache = init_cache(config.num_layers, 1, len(prompt), config.num_kv_heads, config.head_dim, jnp.float32)
    logits, _, _ = from_parameters(config, parameters)(jnp.asarray(prompt)[None], cache, logits="all")
    return np.asarray(logits[0])


def assert_transformers_agrees(checkpoint, exported):
    torch = pytest.importorskip("torch", reason="the live comparison needs torch: pip install torch")
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    prompt = tiny_prompt(load_parameters(checkpoint)[0])
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(prompt, dtype=torch.long)[None]).logits[0].numpy()
    ours = our_logits(checkpoint, prompt)
    assert np.abs(ours - theirs).max() <= LOGITS * np.abs(theirs).max()


@pytest.mark.parametrize("name", WITH_TORCH)
def test_transformers_loads_the_folder_and_gives_the_same_logits(tmp_path, name):
    checkpoint = convert_model(write_family(tmp_path / "hf", CASES[name]), tmp_path / "checkpoint")
    exported = export_model(checkpoint, tmp_path / "exported", shard_bytes=20000)
    assert_transformers_agrees(checkpoint, exported)


def test_transformers_loads_an_original_chatglm_folder_once_converted_and_exported(tmp_path):
    weights = {
        name: array if array.ndim == 1 else array * np.float32(0.3)
        for name, array in tiny_chatglm.glm_weights().items()
    }
    source = tiny_chatglm.write_folder(tmp_path / "chatglm", weights=tiny_chatglm.chatglm_weights(weights))
    checkpoint = convert_model(source, tmp_path / "checkpoint")
    exported = export_model(checkpoint, tmp_path / "exported")
    assert_same(load_file(exported / "model.safetensors"), weights)
    assert not list(exported.glob("*.py"))
    assert load_stop_tokens(exported) == (269, 272)
    assert load_tokenizer(exported)("hello")["input_ids"] == load_tokenizer(source)("hello")["input_ids"]
    assert_transformers_agrees(checkpoint, exported)
    assert not (tmp_path / "ran").exists()

"""What a conversion would do, said without doing it: all that would be written, and all that would be refused."""

import json
import math

import numpy as np
import pytest
from family_folders import CASES, hf_weights, parameters, write_family
from safetensors.numpy import load_file, save_file

from minference_jax.convert.checkpoint import convert_model, load_parameters
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.plan import plan_conversion
from minference_jax.patterns import Dense, uniform_patterns, write_patterns


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", ["llama", "qwen3_tied_bias", "phi3", "glm", "glm4"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_parameter_is_planned_with_its_shape_bytes_and_place(tmp_path, name, dtype):
    source = write_family(tmp_path / "hf", CASES[name], shards=2)
    plan = plan_conversion(source, dtype=dtype)
    config, arrays = load_parameters(source, dtype=dtype)
    assert (plan.config, plan.dtype, plan.refusals) == (config, dtype or "float32", [])
    assert {one.name: (one.shape, one.nbytes) for one in plan.parameters} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    assert plan.nbytes == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("name", ["llama", "qwen3_tied_bias", "phi3", "glm", "glm4"])
def test_every_parameter_is_in_the_place_that_the_plan_names(tmp_path, name):
    plan, weights = plan_conversion(write_family(tmp_path / "hf", CASES[name])), hf_weights(CASES[name])
    for one in plan.parameters:
        ours = parameters(CASES[name])[one.name]
        for layer, expected in enumerate(ours) if one.name.startswith("layers.") else [(None, ours)]:
            tensor = weights[one.tensor.format(layer)]
            rows = tensor if one.rows is None else tensor[one.rows[0] : one.rows[1]]
            np.testing.assert_array_equal(rows.T if one.name.endswith("kernel") else rows, expected, err_msg=one.name)


def test_rows_are_named_only_where_a_tensor_holds_several_parameters(tmp_path):
    plan = plan_conversion(write_family(tmp_path / "hf", CASES["phi3"]))
    places = {one.name: (one.tensor, one.rows) for one in plan.parameters}
    assert places["layers.attention.k_proj.kernel"] == ("model.layers.{}.self_attn.qkv_proj.weight", (32, 48))
    assert places["layers.mlp.up_proj.kernel"] == ("model.layers.{}.mlp.gate_up_proj.weight", (48, 96))
    assert places["lm_head.kernel"] == ("lm_head.weight", None)


def test_a_plan_reads_no_weights_and_writes_nothing(make, tmp_path, monkeypatch):
    source = make.folder(tmp_path / "hf")
    monkeypatch.setattr(HuggingFaceFolder, "read", None)
    plan = plan_conversion(source, tmp_path / "out" / "checkpoint", dtype="bfloat16")
    assert plan.refusals == []
    assert plan.nbytes == 2 * sum(math.prod(shape) for shape in make.hf_shapes(make.CONFIG).values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_gguf_file_is_planned_under_the_names_of_hugging_face(make, tmp_path):
    source = make.gguf(tmp_path / "m.gguf")
    plan = plan_conversion(source, dtype="float16")
    assert (plan.refusals, plan.dtype) == ([], "float16")
    assert {one.name for one in plan.parameters} == load_parameters(source)[1].keys()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_everything_that_would_be_refused_is_listed_at_once(make, tmp_path, dtype):
    source = make.folder(tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights | {"model.extra": np.zeros(2, np.float32)}, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    write_patterns(uniform_patterns(3, 5, Dense()), tmp_path / "p.json")
    (tmp_path / "there").mkdir()
    plan = plan_conversion(source, tmp_path / "there", patterns=tmp_path / "p.json", dtype=dtype)
    there, tensors, tokenizer, patterns = plan.refusals
    assert there.endswith("there already exists; choose another or ask to overwrite it (--overwrite)")
    assert "unmatched: model.extra" in tensors
    assert "missing: model.layers.1.mlp.up_proj.weight" in tensors
    assert tokenizer.startswith(f"the tokenizer of {source} can't be loaded: ")
    assert "do not fit a model of 3 layers of 4 heads" in patterns
    assert plan.config is not None


def test_config_that_is_refused_hides_no_other_fault(make, tmp_path):
    source = make.folder(tmp_path / "hf", hidden_act="gelu", surprise=1)
    (source / "tokenizer.json").write_text("{}")
    plan = plan_conversion(source, patterns=tmp_path / "absent.json")
    config, tokenizer, patterns = plan.refusals
    assert "hidden_act='gelu' is not supported" in config
    assert "surprise=1 is not a field this converter knows" in config
    assert "can't be loaded" in tokenizer
    assert "absent.json" in patterns
    assert (plan.config, plan.dtype, plan.parameters, plan.nbytes) == (None, None, [], 0)


def test_what_a_plan_refuses_a_conversion_refuses_and_the_other_way_round(make, tmp_path):
    destination = tmp_path / "checkpoint"
    good = make.folder(tmp_path / "good")
    faulty = [make.folder(tmp_path / f"faulty{index}") for index in range(4)]
    change_config(faulty[0], hidden_act="gelu")
    change_config(faulty[1], num_hidden_layers=4)
    (faulty[2] / "tokenizer.json").write_text("{}")
    (faulty[3] / "model.safetensors").write_bytes((faulty[3] / "model.safetensors").read_bytes()[:-1])
    for source in faulty:
        (refusal,) = plan_conversion(source, destination).refusals
        with pytest.raises(ValueError, match=r"can't be loaded|not supported|do not fit|cut short") as error:
            convert_model(source, destination)
        assert str(error.value) == refusal
    assert plan_conversion(good, destination).refusals == []
    convert_model(good, destination)
    assert len(plan_conversion(good, destination).refusals) == 1
    assert plan_conversion(good, destination, overwrite=True).refusals == []


def test_tokenizer_that_needs_the_config_is_not_refused(make, tmp_path):
    """transformers takes the kind of tokenizer from config.json where tokenizer_config.json does not say it."""
    source = make.folder(tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()
    assert plan_conversion(source).refusals == []
    convert_model(source, tmp_path / "checkpoint")


def test_model_that_is_not_there_and_unknown_dtype_are_refused_at_once(make, tmp_path):
    with pytest.raises(ValueError, match="does not exist, and is no Hugging Face id"):
        plan_conversion(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype='int8' must be None or one of"):
        plan_conversion(make.folder(tmp_path / "hf"), dtype="int8")

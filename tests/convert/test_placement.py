"""Loading onto devices: every byte is read once, and each device gets its own part of every parameter."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from family_folders import CASES, hf_weights, parameters, write_family
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from minference_jax.convert import placement
from minference_jax.convert.checkpoint import convert_model, load_parameters
from minference_jax.convert.hf_config import read_config
from minference_jax.convert.placement import Part
from minference_jax.models.partition import parameter_shardings

TESTS = Path(__file__).parent.parent
SPLIT = {"num_key_value_heads": 4, "vocab_size": 64, "num_hidden_layers": 2}  # what four devices can share
FAMILIES = ("llama", "qwen3_tied_bias", "phi3", "glm", "glm4")
SPLIT_CASES = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("folders")
    made = {name: write_family(base / name, CASES[name] | SPLIT, shards=3) for name in FAMILIES}
    made |= {f"parts_of_{name}": made[name] for name in ("llama", "phi3", "glm")}
    made["checkpoint"] = convert_model(made["phi3"], base / "checkpoint")
    made["whole"] = write_family(base / "whole", CASES["phi3"] | SPLIT | {"num_key_value_heads": 2, "vocab_size": 61})
    made["float16"] = write_family(base / "large", CASES["phi3"] | SPLIT)
    weights = load_file(made["float16"] / "model.safetensors")
    weights["model.layers.1.self_attn.qkv_proj.weight"][50, 3] = -1e5  # a row of k
    save_file(weights, made["float16"] / "model.safetensors")
    made["heads"] = write_family(base / "heads", CASES["llama"] | {"num_attention_heads": 6, "head_dim": 8})
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    """What came of loading each of the folders onto a mesh of 2 x 4 devices."""
    words = [str(word) for pair in folders.items() for word in pair]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-P", str(TESTS / "eight_devices.py"), *words]
    ended = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def assert_right(facts):
    assert {kind: facts[kind] for kind in facts if kind.startswith("wrong")} == {
        "wrong_shardings": [],
        "wrong_names": [],
        "wrong_values": [],
    }


@SPLIT_CASES
def test_every_family_is_split_over_a_mesh(loaded, name):
    facts = loaded[name]
    assert_right(facts)
    fields = CASES[name] | SPLIT
    size, inner = fields.get("head_dim", 8), fields["intermediate_size"]
    on_one = facts["shapes_on_a_device"]
    assert on_one["layers.attention.q_proj.kernel"] == [2, 32, size]
    assert on_one["layers.attention.k_proj.kernel"] == [2, 32, size]
    assert on_one["layers.attention.o_proj.kernel"] == [2, size, 32]
    assert on_one["layers.mlp.gate_proj.kernel"] == [2, 32, inner // 4]
    assert on_one["layers.mlp.down_proj.kernel"] == [2, inner // 4, 32]
    assert on_one["embed.embedding"] == [16, 32]
    assert on_one["layers.input_norm.scale"] == [2, 32]
    if "lm_head.kernel" in on_one:
        assert on_one["lm_head.kernel"] == [32, 16]
    if "layers.attention.v_proj.bias" in on_one:
        assert on_one["layers.attention.v_proj.bias"] == [2, size]


@pytest.mark.parametrize("name", [*FAMILIES, "parts_of_llama", "parts_of_phi3", "parts_of_glm", "whole"])
def test_every_row_is_read_exactly_once(loaded, folders, name):
    weights = hf_weights(json.loads((folders[name] / "config.json").read_text()))
    expected = {tensor: [[row, 1] for row in range(len(array))] for tensor, array in weights.items()}
    assert loaded[name]["read"] == expected


@pytest.mark.parametrize("name", ["llama", "phi3", "glm"])
def test_parts_smaller_than_a_tensor_give_the_same(loaded, name):
    assert_right(loaded[f"parts_of_{name}"])


def test_checkpoint_is_split_over_a_mesh_and_read_once(loaded):
    facts = loaded["checkpoint"]
    assert_right(facts)
    assert len(facts["read"]) == 3 + 2 * 9
    assert {tuple(map(tuple, counts)) for counts in facts["read"].values()} == {((0, 1),)}
    assert facts["shapes_on_a_device"] == loaded["phi3"]["shapes_on_a_device"]


def test_kv_heads_and_vocabulary_that_cannot_be_shared_out_are_on_every_device(loaded):
    facts = loaded["whole"]
    assert_right(facts)
    on_one = facts["shapes_on_a_device"]
    for name in ("k_proj", "v_proj"):
        assert on_one[f"layers.attention.{name}.kernel"] == [2, 32, 16]
    assert on_one["embed.embedding"] == [61, 32]
    assert on_one["lm_head.kernel"] == [32, 61]
    assert on_one["layers.attention.q_proj.kernel"] == [2, 32, 8]


def test_number_that_does_not_fit_is_refused_by_name_on_a_mesh(loaded):
    (sentence,) = loaded["float16"].values()
    assert sentence == "layers.attention.k_proj.kernel holds 100000, which float16 can't; use float32 or bfloat16"


def test_number_that_does_not_fit_is_refused_by_name_on_one_device(folders):
    with pytest.raises(ValueError, match=r"layers\.attention\.k_proj\.kernel holds 100000, which float16 can't"):
        load_parameters(folders["float16"], dtype="float16")


def test_infinity_that_is_in_the_source_is_kept(tmp_path):
    path = write_family(tmp_path / "hf", CASES["llama"])
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][3] = -np.inf
    save_file(weights, path / "model.safetensors")
    assert load_parameters(path, dtype="float16")[1]["final_norm.scale"][3] == -np.inf


def test_heads_that_cannot_be_shared_out_are_refused(loaded):
    assert loaded["heads"] == {"refused": "num_heads=6 can't be split over 4 devices equally"}


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"data": 2}, "the mesh has the axes ('data',), none is called 'model'"),
        ({"model": 3}, "num_heads=4 can't be split over 3 devices equally"),
        ({"data": 3, "model": 4}, "intermediate_size=46 can't be split over 4 devices equally"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_mesh_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, monkeypatch, kind, axes, sentence):
    path = write_family(tmp_path / "hf", CASES["llama"] | {"intermediate_size": 46})
    if kind == "checkpoint":
        path = convert_model(path, tmp_path / "checkpoint")
    monkeypatch.setattr("minference_jax.convert.checkpoint.place", None)
    with pytest.raises(ValueError, match=r"^the mesh has|can't be split") as error:
        load_parameters(path, mesh=AbstractMesh(tuple(axes.values()), tuple(axes)))
    assert str(error.value) == sentence


def test_shardings_name_the_sides_that_are_split():
    config = read_config(CASES["glm"] | SPLIT)
    mesh = AbstractMesh((2, 4), ("data", "model"))
    shardings = parameter_shardings(config, mesh)
    assert shardings.keys() == parameters(CASES["glm"]).keys()
    assert shardings["layers.attention.q_proj.kernel"] == NamedSharding(mesh, PartitionSpec(None, None, "model"))
    assert shardings["layers.mlp.down_proj.kernel"] == NamedSharding(mesh, PartitionSpec(None, "model", None))
    assert shardings["layers.attention.k_proj.bias"] == NamedSharding(mesh, PartitionSpec(None, "model"))
    other = parameter_shardings(config, AbstractMesh((2, 4), ("data", "model")), axis="data")
    assert other["embed.embedding"].spec == PartitionSpec("data", None)


@pytest.mark.parametrize("rows", [1, 5, 2**20])
@pytest.mark.parametrize("name", ["phi3", "glm_one_kv_head", "mistral"])
def test_parts_make_up_the_parameters_on_one_device(tmp_path, monkeypatch, name, rows):
    path, expected = write_family(tmp_path / "hf", CASES[name], shards=2), parameters(CASES[name])
    monkeypatch.setattr(placement, "PART_BYTES", rows * 32 * 4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    for _, arrays in (load_parameters(path), load_parameters(path, mesh=mesh)):
        assert arrays.keys() == expected.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), expected[key], err_msg=key)


@st.composite
def partitions(draw):
    """A parameter's shape, a part of it with or without a layer, and a grid of boxes that cover the parameter."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    begin = [draw(st.integers(0, side - 1)) for side in shape]
    end = [draw(st.integers(low + 1, side)) for low, side in zip(begin, shape, strict=True)]
    with_layers = len(shape) > 1 and draw(st.booleans())
    if with_layers:
        end[0] = begin[0] + 1
    cuts = [sorted(draw(st.sets(st.integers(1, side), max_size=3)) | {0, side}) for side in shape]
    boxes = list(itertools.product(*(list(itertools.pairwise(edges)) for edges in cuts)))
    return shape, begin, end, with_layers, boxes, draw(st.booleans())


@given(partitions())
def test_pieces_of_a_part_make_up_the_part_however_the_parameter_is_cut(case):
    shape, begin, end, with_layers, boxes, turned = case
    sides = [high - low for low, high in zip(begin, end, strict=True)]
    values = 1 + np.arange(math.prod(sides)).reshape(sides)
    stored = values[0] if with_layers else values
    part = Part(tuple(begin), stored.T if turned else stored, turned)
    expected = np.zeros(shape, int)
    expected[tuple(slice(low, high) for low, high in zip(begin, end, strict=True))] = values
    written = np.zeros(shape, int)
    for box in boxes:
        if (piece := part.cut(box)) is None:
            continue
        array = piece.array.T if piece.is_turned else piece.array
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        corner = [low + start for (low, _), start in zip(box, piece.start, strict=True)]
        index = tuple(slice(low, low + side) for low, side in zip(corner, array.shape, strict=True))
        assert array.size
        assert all(low + side <= high for low, side, (_, high) in zip(corner, array.shape, box, strict=True))
        assert not written[index].any()
        written[index] = array
    np.testing.assert_array_equal(written, expected)

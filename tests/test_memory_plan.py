"""What a prefill would take of the device: told without weights, refused with figures and a setting that fits."""

import jax
import pytest
from small_models import write_model

from minference_jax import AShape, compile_ahead, load
from minference_jax.cli import main
from minference_jax.loading import load_shapes
from minference_jax.measure import device_name
from minference_jax.plan import other_plans, plan_memory, refusal

A_SHAPE = {"attention": "a_shape", "pattern": AShape(sink_size=4, window_size=40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shapes(folder):
    return load_shapes(folder, dtype="float32")


def test_a_plan_without_weights_is_that_of_the_model(folder, shapes):
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes._state))
    plan = plan_memory(shapes, 300, max_new_tokens=30, **A_SHAPE)
    model = load(folder, dtype="float32")
    real = tuple(compile_ahead(model, [300], max_new_tokens=30, **A_SHAPE))
    assert [one._replace(seconds=0) for one in plan.programs] == [one._replace(seconds=0) for one in real]
    assert plan.needed_bytes == max(one.total_bytes for one in real)
    assert plan.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model._state))
    assert plan.limit_bytes is None
    assert plan.fits  # as far as a CPU says
    assert load_shapes(folder, linear="fp8").model.dtype == "bfloat16"


def test_what_does_not_fit_is_refused_with_figures_and_the_setting_that_fits(shapes, monkeypatch):
    monkeypatch.setattr("minference_jax.plan._CHUNK_SIZES", (256, 128))
    needed = {size: plan_memory(shapes, 500, chunk_size=size, **A_SHAPE).needed_bytes for size in (None, 256, 128)}
    assert needed[None] > needed[256] > needed[128]
    plan = plan_memory(shapes, 500, limit_bytes=needed[None] - 1, **A_SHAPE)
    assert not plan.fits
    (other,) = other_plans(shapes, 500, limit_bytes=needed[256], **A_SHAPE)
    assert other.changed == {"chunk_size": 256}
    assert f"with --chunk-size 256 it takes {needed[256] / 1e9:.2f} GB" in refusal(plan, [other])
    every = list(other_plans(shapes, 500, limit_bytes=1, **A_SHAPE))
    assert [one.changed["chunk_size"] for one in every] == [256, 128, None, 256, 128, None]
    assert [one.changed.get("kv_cache") for one in every] == [None, None, "int8", "int8", "int8", "snapkv"]
    least = min(every, key=lambda one: one.needed_bytes).needed_bytes
    assert f", the least that was tried, it takes {least / 1e9:.2f} GB" in refusal(plan, every)
    assert every[4].needed_bytes < every[1].needed_bytes  # in chunks of 128 the smaller cache takes less
    small = {"kv_cache": "int8", "chunk_size": 256}
    assert next(other_plans(shapes, 500, limit_bytes=1, **small, **A_SHAPE)).changed == {"chunk_size": 128}
    assert not list(other_plans(shapes, 500, kv_cache="host", limit_bytes=1, **A_SHAPE))
    chunked = plan_memory(shapes, 500, chunk_size=128, limit_bytes=1, **A_SHAPE)
    whole = next(one for one in every if one.changed == {"kv_cache": "int8", "chunk_size": None})
    assert "; with --kv-cache int8 and no --chunk-size, the least" in refusal(chunked, [whole])
    assert "; with --kv-cache int8, the least" in refusal(plan, [whole])
    assert refusal(plan, []).endswith("read a shorter prompt or fewer at once")


@pytest.mark.parametrize("dtype", [None, "int8", "wide"])
def test_shapes_are_of_a_dtype_that_models_have(folder, dtype):
    with pytest.raises(ValueError, match=f"^dtype={dtype!r}"):
        load_shapes(folder, dtype=dtype)


def test_the_command_prints_the_memory_and_refuses_what_does_not_fit(folder, capsys):
    options = ["plan", "--model", str(folder), "--length", "300", "--max-new-tokens", "0", "--dtype", "float32"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("prefill      1        320 ")
    assert f" are needed on {device_name()}, " in out
    assert out.rstrip().endswith("what there is is not known")
    assert main([*options, "--memory", "0.0001"]) == 1
    captured = capsys.readouterr()
    assert "prefill of 1 x 320 tokens takes 0.00 GB" in captured.err
    assert "jax may use 0.00 GB" in captured.err
    assert captured.err.count("\n") == 1

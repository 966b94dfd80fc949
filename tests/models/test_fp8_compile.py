"""What XLA makes of linear layers of 8-bit numbers: products of 8-bit operands on Hopper, of wider ones on Ampere."""

import os
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from deviceless import Case, available, compile_cases
from flax import nnx

from minference_jax.bench.shapes import SHAPES
from minference_jax.convert.hf_config import read_config
from minference_jax.kernels.tiles import Device
from minference_jax.models import Llama, fp8, quantize_linear
from minference_jax.models.fp8 import FP8, Fp8Linear

HOPPER = Device(platform="cuda", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
AMPERE = Device(platform="cuda", kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
CALL = "cublas$lt$matmul$f8" if fp8.CAN_NAME_ALGORITHM else "dot"  # without, XLA times Triton kernels, too
TOKENS = 16384


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def on(device, function):
    """The function, traced as where the device is jax's own."""

    def traced(*arguments):
        with mock.patch.object(fp8, "device_of", return_value=device):
            return function(*arguments)

    return traced


def product(x, weight, scale):
    return Fp8Linear(weight, scale)(x)


def product_case(name, device, dtype, tokens=TOKENS):
    weight, scale = array(1024, 4096, dtype=FP8), array(1024, dtype="float32")
    return Case(name, on(device, product), (array(1, tokens, 4096, dtype=dtype), weight, scale), products=True)


def layer_case():
    """One layer of Llama-3-8B without its attention; smaller ones have products that XLA merges."""
    config = replace(read_config(SHAPES["llama3-8b"]), num_layers=1)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: quantize_linear(Llama(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)))
    )

    def run(state, x, lengths):
        def give(q, k, v, layer_input, **where):
            return q + jnp.repeat(k + v, 4, axis=2), None

        return nnx.merge(graph, state).run_layer(0, x, lengths, give)[0]

    arguments = (state, array(1, TOKENS, 4096, dtype="bfloat16"), array(1, dtype="int32"))
    return Case("a layer", on(HOPPER, run), arguments, products=True)


CASES_H100 = [
    layer_case(),
    product_case("bfloat16", HOPPER, "bfloat16"),
    product_case("float16", HOPPER, "float16"),
    *(product_case(f"{tokens} tokens", HOPPER, "bfloat16", tokens=tokens) for tokens in (1, 2, 40)),
]
CASES_A100 = [product_case(dtype, AMPERE, dtype) for dtype in ("bfloat16", "float16", "float32")]

on_an_h100, on_an_a100 = (pytest.mark.parametrize("kind", [kind], indirect=True) for kind in ("h100", "a100"))


@pytest.fixture(scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reports(kind):
    if reason := available():
        if os.environ.get("MINFERENCE_JAX_NEEDS_COMPILER"):  # set in the gate, where nothing of this may be skipped
            pytest.fail(reason)
        pytest.skip(reason)
    return compile_cases(kind, __file__, f"CASES_{kind.upper()}")


@on_an_h100
@pytest.mark.parametrize(("name", "result"), [("bfloat16", "bf16"), ("float16", "f32")])
def test_on_hopper_a_layer_is_one_8_bit_product_without_a_transpose(reports, name, result):
    report = reports[name]
    assert report.error is None
    assert list(report.products) == [f"{CALL} f8e4m3fn f8e4m3fn -> {result}"]
    assert not report.transposes


@on_an_h100
@pytest.mark.skipif(not fp8.CAN_NAME_ALGORITHM, reason="this jax can't name the algorithm")
def test_on_hopper_there_is_no_product_of_which_xla_would_time_triton_kernels(reports):
    for tokens in (1, 2, 40):
        report = reports[f"{tokens} tokens"]
        assert report.error is None
        assert not [product for product in report.products if product.startswith("dot")]
        assert ("f8e4m3fn" in str(report.products)) == (tokens > 1)  # of one row it is a sum


@on_an_h100
def test_on_hopper_all_products_of_a_layer_are_of_8_bit_numbers(reports):
    report = reports["a layer"]
    assert report.error is None
    assert set(report.products) == {f"{CALL} f8e4m3fn f8e4m3fn -> bf16"}
    assert len(report.products) in (6, 7)  # newer XLA merges k and v
    assert "f8e4m3fn" not in report.transposes


@on_an_a100
@pytest.mark.parametrize("name", [case.name for case in CASES_A100])
def test_on_ampere_8_bit_numbers_are_widened(reports, name):
    report = reports[name]
    assert report.error is None
    (product,) = report.products
    assert product.startswith("cublas$lt$matmul ")
    assert "f8" not in product

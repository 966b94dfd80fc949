"""What XLA makes of linear layers of 8-bit numbers: products of 8-bit operands on Hopper, of wider ones on Ampere."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from deviceless import Case, available, compile_cases
from flax import nnx

from minference_jax.bench.shapes import SHAPES
from minference_jax.convert.hf_config import read_config
from minference_jax.models import Llama, quantize_linear
from minference_jax.models.fp8 import FP8, Fp8Linear

NO_TRITON = {"xla_gpu_enable_triton_gemm": False}  # of XLA's own; Pallas kernels do not ask it
TOKENS = 16384


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(x, weight, scale):
    return Fp8Linear(weight, scale)(x)


def product_case(name, dtype, tokens=TOKENS, **given):
    weight, scale = array(1024, 4096, dtype=FP8), array(1024, dtype="float32")
    return Case(name, product, (array(tokens, 4096, dtype=dtype), weight, scale), products=True, **given)


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
    return Case("a layer", run, arguments, products=True, options=NO_TRITON)


CASES_H100 = [
    layer_case(),
    product_case("bfloat16", "bfloat16"),
    product_case("bfloat16, cuBLAS", "bfloat16", options=NO_TRITON),
    product_case("float16, cuBLAS", "float16", options=NO_TRITON),
    product_case("one token", "bfloat16", tokens=1),
]
CASES_A100 = [product_case(dtype, dtype) for dtype in ("bfloat16", "float16", "float32")]


ONE_CARD = {kind: [pytest.mark.xdist_group(kind)] for kind in ("a100", "h100")}
on_an_h100, on_an_a100 = (
    pytest.mark.parametrize("kind", [pytest.param(kind, marks=ONE_CARD[kind])], indirect=True)
    for kind in ("h100", "a100")
)


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
@pytest.mark.parametrize(("name", "result"), [("bfloat16, cuBLAS", "bf16"), ("float16, cuBLAS", "f32")])
def test_on_hopper_a_layer_is_one_8_bit_product_of_cublas_without_a_transpose(reports, name, result):
    report = reports[name]
    assert report.error is None
    assert list(report.products) == [f"cublas$lt$matmul$f8 f8e4m3fn f8e4m3fn -> {result}"]
    assert not report.transposes


@on_an_h100
def test_on_hopper_the_product_that_xla_chooses_among_is_of_8_bit_numbers_too(reports):
    report = reports["bfloat16"]
    assert report.error is None
    assert [product.split(" -> ")[0] for product in report.products] == ["dot f8e4m3fn f8e4m3fn"]


@on_an_h100
def test_on_hopper_all_products_of_a_layer_are_of_8_bit_numbers(reports):
    report = reports["a layer"]
    assert report.error is None
    assert set(report.products) == {"cublas$lt$matmul$f8 f8e4m3fn f8e4m3fn -> bf16"}
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

"""Linear layers of 8-bit numbers against numpy's model of the same rounding, at their edges, and in every family."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from goldens import families, tiny_models

from minference_jax.cache import init_cache
from minference_jax.models import from_parameters, linear_of, parameter_shapes, parameters_of, quantize_linear
from minference_jax.models.digest import weights_digest
from minference_jax.models.fp8 import Fp8Linear, quantize_kernel, quantize_parameters, quantize_rows

ROUNDING = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # of the largest result: sums and result
LOGITS = 0.15  # relative Frobenius error over the tiny models, whose weights are random; measured 0.08 to 0.11
PROJECTIONS = [f"attention.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def random(shape, dtype="float32", seed=0):
    """Normal numbers whose rows and columns differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-8, 2, (shape[0], 1))) * np.exp2(rng.integers(-3, 3, (1, shape[1])))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def numpy_rows(x):
    x = np.asarray(x).astype(np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(448), np.finfo(np.float32).tiny)
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def numpy_product(x, kernel, bias):
    return numpy_rows(x) @ numpy_rows(np.asarray(kernel).T).T + np.asarray(bias, np.float64)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_layer_gives_what_numpy_gives_with_the_same_rounding_and_keeps_its_bound(dtype):
    x, kernel, bias = random((40, 96), dtype), random((96, 24), dtype, seed=1), random((1, 24), dtype, seed=2)[0]
    layer = Fp8Linear(*quantize_kernel(kernel), bias)
    out = jax.jit(lambda x: layer(x.reshape(2, 20, 96)))(x)
    assert out.dtype == dtype
    assert out.shape == (2, 20, 24)
    out = np.asarray(out, np.float64).reshape(40, 24)
    expected = numpy_product(x, kernel, bias)
    rows, columns = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(kernel, np.float64))
    size = rows @ columns + np.abs(np.asarray(bias, np.float64))
    assert (np.abs(out - expected) / size).max() <= ROUNDING[dtype]
    # each number is off by 2^-4 of itself at most, or by 2^-10 of the scale, which is 2^-18 of its row's largest
    off_rows = rows * 2.0**-4 + rows.max(1, keepdims=True) * 2.0**-18
    off_columns = columns * 2.0**-4 + columns.max(0) * 2.0**-18
    bound = off_rows @ columns + rows @ off_columns + off_rows @ off_columns + ROUNDING[dtype] * size
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    assert (np.abs(out - exact) <= bound).all()
    assert np.linalg.norm(out - exact) > 1e-3 * np.linalg.norm(exact)  # it is not the exact product


def test_each_token_has_its_own_scale_and_each_output_its_own():
    x, kernel = random((8, 64)), random((64, 16), seed=1)
    layer = Fp8Linear(*quantize_kernel(kernel))
    error = np.asarray(layer(x)) - np.asarray(x) @ np.asarray(kernel)
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    assert (np.abs(error) / size).max() < 0.06
    np.testing.assert_allclose(layer(x[3:4]), layer(x)[3:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_overflows_and_a_row_of_zeros_gives_the_bias(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = np.zeros((4, 32), np.float32)
    x[1], x[2], x[3, :2] = largest, 1e-40, (1e30, 1e-30)
    kernel, bias = jnp.full((32, 8), 1e-3, dtype), jnp.ones(8, dtype)
    out = np.asarray(Fp8Linear(*quantize_kernel(kernel), bias)(jnp.asarray(x, dtype)), np.float64)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[[0, 2]], 1.0)
    np.testing.assert_allclose(out[1], 32e-3 * largest, rtol=0.01)
    np.testing.assert_allclose(out[3], 1e27, rtol=0.07)
    rows, scale = quantize_rows(jnp.asarray(x, dtype))
    assert np.abs(rows.astype(jnp.float32)).max() == 448
    assert (scale > 0).all()
    zeros = Fp8Linear(*quantize_kernel(jnp.zeros((32, 8), dtype)))
    np.testing.assert_array_equal(zeros(jnp.ones((2, 32), dtype)), 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_gives_nan_in_its_own_token_alone(value):
    x = np.array(random((3, 32)))
    x[1, 5] = value
    out = Fp8Linear(*quantize_kernel(random((32, 8), seed=1)))(jnp.asarray(x))
    np.testing.assert_array_equal(np.isnan(out).all(axis=1), [False, True, False])
    assert np.isfinite(out[np.array([0, 2])]).all()


FAMILIES = ["default_untied", "attention_bias", "qwen3", "phi3_longrope_long", "glm", "glm4"]


def tiny(name, dtype="float32"):
    """A tiny model, its config, and random parameters of it."""
    config = families.our_config(name) if name in families.CASES else tiny_models.CASES[name]
    rng, parameters = np.random.default_rng(0), {}
    for key, shape in parameter_shapes(config).items():
        numbers = 1 + 0.1 * rng.standard_normal(shape) if key.endswith("scale") else 0.1 * rng.standard_normal(shape)
        parameters[key] = jnp.asarray(numbers, dtype)
    return from_parameters(config, parameters)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, state, tokens):
    model = nnx.merge(graph, state)
    config = model.config
    cache = init_cache(config.num_layers, 2, 24, config.num_kv_heads, config.head_dim, model.dtype)
    return model(tokens, cache, logits="all")[0]


def logits(model):
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 20)).astype(np.int32)
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(tokens)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_of_every_family_is_replaced_and_logits_stay_close(name):
    exact = tiny(name)
    fast = quantize_linear(exact)
    for path in PROJECTIONS:
        module, leaf = path.split(".")
        assert isinstance(getattr(getattr(fast.layers, module), leaf), Fp8Linear), path
    assert (linear_of(exact), linear_of(fast)) == (None, "fp8")
    assert fast.dtype == exact.dtype
    before, after = logits(exact), logits(fast)
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert 1e-3 < error < LOGITS


def test_the_other_parameters_are_shared_and_the_weights_of_linear_layers_take_half_the_memory():
    exact = tiny("attention_bias", "bfloat16")
    fast = quantize_linear(exact)
    before, after = parameters_of(exact), parameters_of(fast)
    for name in before.keys() & after.keys():
        np.testing.assert_array_equal(np.asarray(before[name]), np.asarray(after[name]))
    for stem in (name.removesuffix(".kernel") for name in before.keys() - after.keys()):
        kernel, weight, scale = before[f"{stem}.kernel"], after[f"{stem}.weight"], after[f"{stem}.weight_scale"]
        assert 2 * weight.nbytes == kernel.nbytes
        assert scale.shape == (kernel.shape[0], kernel.shape[2])
        assert str(weight.dtype) == "float8_e4m3fn"
    assert len(before.keys() - after.keys()) == len(PROJECTIONS)
    assert "lm_head.kernel" in after


def test_the_digest_tells_an_8_bit_model_from_the_exact_one_and_from_another():
    exact, other = tiny("default_untied"), tiny("default_untied")
    fast = quantize_linear(exact)
    parameters = parameters_of(fast)
    name = "layers.mlp.up_proj.weight_scale"
    other = from_parameters(exact.config, {**parameters, name: parameters[name].at[0, 0].mul(2)})
    digests = [weights_digest(model) for model in (exact, fast, other, quantize_linear(exact))]
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[1]


def test_parameters_go_there_and_back_and_may_have_fewer_layers():
    fast = quantize_linear(tiny("default_untied"))
    config, parameters = fast.config, parameters_of(fast)
    np.testing.assert_array_equal(logits(from_parameters(config, parameters)), logits(fast))
    first = {name: array[:1] if name.startswith("layers.") else array for name, array in parameters.items()}
    logits(from_parameters(dataclasses.replace(config, num_layers=1), first))


def test_parameters_that_do_not_fit_are_refused():
    exact = tiny("default_untied")
    parameters = quantize_parameters(parameters_of(exact))
    name = "layers.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"mistyped: {name} is int8, the model needs float8_e4m3fn"):
        from_parameters(exact.config, {**parameters, name: parameters[name].astype(jnp.int8)})
    with pytest.raises(ValueError, match=f"missing: {name}"):
        from_parameters(exact.config, {key: array for key, array in parameters.items() if key != name})
    with pytest.raises(ValueError, match="linear='int4' must be \"fp8\""):
        quantize_linear(exact, "int4")
    with pytest.raises(ValueError, match="are fp8 already"):
        quantize_linear(quantize_linear(exact))

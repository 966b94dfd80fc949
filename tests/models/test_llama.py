"""How the LLaMA behaves, whatever its weights: cache, padding, the seam to attention, parameters, dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.tiny_models import CASES, tiny_parameters

from minference_jax.cache import extend_cache, init_cache
from minference_jax.models import Llama, dense_attend, from_parameters, parameter_shapes, parameters_of

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 sums over other shapes; logits are about 5
TOKENS = np.random.default_rng(3).integers(0, 61, (2, 20)).astype(np.int32)


CAPACITY = 24


def tiny(name="default_untied", **changes):
    config = dataclasses.replace(CASES[name], **changes)
    return from_parameters(config, tiny_parameters(config))


def empty(model, batch, capacity=CAPACITY, dtype=jnp.float32):
    config = model.config
    return init_cache(config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim, dtype)


@functools.partial(jax.jit, static_argnames=("graph", "logits"))
def _read(graph, state, tokens, cache, lengths, logits):
    return nnx.merge(graph, state)(tokens, cache, lengths=lengths, logits=logits)[:2]


def read(model, tokens, cache=None, lengths=None, logits="all"):
    """Logits and cache; the compiled program is shared by all tests that call with the same shapes."""
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else jnp.array(lengths)
    cache = empty(model, len(tokens)) if cache is None else cache
    return _read(*nnx.split(model), jnp.asarray(tokens), cache, lengths, logits)


def test_last_logits_are_those_of_each_rows_last_true_token():
    model = tiny()
    last, cache = read(model, TOKENS, lengths=[20, 13], logits="last")
    every, _ = read(model, TOKENS)
    np.testing.assert_allclose(last, jnp.stack([every[0, 19], every[1, 12]]), **CLOSE)
    np.testing.assert_array_equal(cache.length, [20, 13])


@pytest.mark.parametrize("name", ["default_untied", "dynamic_long"])
def test_a_row_of_an_unequal_batch_equals_the_row_alone(name):
    model = tiny(name)
    together, _ = read(model, TOKENS, lengths=[20, 17])
    alone, _ = read(model, TOKENS[1:, :17])
    np.testing.assert_allclose(together[1, :17], alone[0], **CLOSE)


def test_padding_does_not_reach_the_result():
    model, other = tiny(), TOKENS.copy()
    other[1, 13:] = 0
    first, _ = read(model, TOKENS, lengths=[20, 13], logits="last")
    second, _ = read(model, other, lengths=[20, 13], logits="last")
    np.testing.assert_array_equal(first, second)


def test_future_tokens_do_not_reach_earlier_logits():
    model, other = tiny(), TOKENS.copy()
    other[:, 10:] = 1
    np.testing.assert_array_equal(read(model, TOKENS)[0][:, :10], read(model, other)[0][:, :10])


def test_reading_in_pieces_equals_reading_at_once():
    model, cache, pieces = tiny(), None, []
    for start, stop in ((0, 9), (9, 18), (18, 19), (19, 20)):
        logits, cache = read(model, TOKENS[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), read(model, TOKENS)[0], **CLOSE)


def test_decoding_overwrites_padding_after_an_unequal_batch():
    model = tiny()
    _, cache = read(model, TOKENS[:, :18], empty(model, 2, 18), lengths=[18, 11])
    cache = extend_cache(cache, CAPACITY)
    for step in range(2):
        logits, cache = read(model, np.array([[TOKENS[0, 18 + step]], [TOKENS[1, 11 + step]]]), cache)
    every, _ = read(model, TOKENS)
    np.testing.assert_allclose(logits[:, 0], jnp.stack([every[0, 19], every[1, 12]]), **CLOSE)
    np.testing.assert_array_equal(cache.length, [20, 13])


def test_attention_is_told_its_layer_and_its_answers_are_stacked():
    model, seen = tiny(), {}

    def attend(q, k, v, layer_input, *, scale, q_offset, kv_len):
        seen.update(q=q.shape, k=k.shape, v=v.shape, scale=scale, q_offset=q_offset.shape, kv_len=kv_len.shape)
        out, _ = dense_attend(q, k, v, None, scale=scale, q_offset=q_offset, kv_len=kv_len)
        return out * layer_input["gate"], {"gate": layer_input["gate"], "kv_len": kv_len}

    _, _, aux = model(
        jnp.asarray(TOKENS), empty(model, 2, 32), attend=attend, layer_inputs={"gate": jnp.array([1.0, 2.0, 3.0])}
    )
    expected = {"q": (2, 20, 4, 8), "k": (2, 32, 2, 8), "v": (2, 32, 2, 8)}
    assert seen == expected | {"scale": 8**-0.5, "q_offset": (2,), "kv_len": (2,)}
    np.testing.assert_array_equal(aux["gate"], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(aux["kv_len"], np.full((3, 2), 20))


def test_program_does_not_grow_with_the_number_of_layers():
    def matrix_products(num_layers):
        model = tiny(num_layers=num_layers)
        arguments = (jnp.asarray(TOKENS), empty(model, 2), jnp.array([20, 20]), "last")
        return _read.lower(*nnx.split(model), *arguments).as_text().count("dot_general")

    assert matrix_products(2) == matrix_products(9) > 7


def test_donated_cache_is_updated_in_place():
    model = tiny()
    graph, state = nnx.split(model)
    cache = empty(model, 1, 4096)
    step = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state)(tokens, cache)[:2], donate_argnames="cache")
    memory = step.lower(state, jnp.zeros((1, 1), jnp.int32), cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes


def test_bfloat16_model_answers_in_float32_and_close_to_float32():
    exact = tiny()
    rounded = {name: array.astype(jnp.bfloat16) for name, array in parameters_of(exact).items()}
    model = from_parameters(exact.config, rounded)
    logits, cache = read(model, TOKENS, empty(model, 2, dtype=jnp.bfloat16))
    assert (logits.dtype, cache.k.dtype) == (jnp.float32, jnp.bfloat16)
    error = jnp.abs(logits - read(exact, TOKENS)[0]).max()
    assert 0 < error < 0.25  # of logits up to 5, with 8 bits of mantissa


def test_cache_that_does_not_fit_the_model_is_refused():
    model, tokens = tiny(), jnp.asarray(TOKENS)
    with pytest.raises(ValueError, match=r"cache.k is bfloat16, the model's parameters are float32"):
        model(tokens, empty(model, 2, 20, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"20 new tokens do not fit a cache of 19"):
        model(tokens, empty(model, 2, 19))
    with pytest.raises(ValueError, match=r"20 new tokens do not fit a cache of 30 that holds 11 already"):
        model(tokens, empty(model, 2, 30)._replace(length=jnp.array([3, 11])))
    with pytest.raises(
        ValueError, match=r"cache.k is \[3, 1, 20, 2, 8\], this model and batch need \[3, 2, 20, 2, 8\]"
    ):
        model(tokens, empty(model, 1, 20))


def test_wrong_arguments_of_a_call_are_refused():
    model, tokens = tiny(), jnp.asarray(TOKENS)
    with pytest.raises(ValueError, match=r"logits='first' must be"):
        model(tokens, empty(model, 2, 20), logits="first")
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\]"):
        model(tokens[0], empty(model, 2, 20))
    with pytest.raises(ValueError, match=r"lengths must be \[2\]"):
        model(tokens, empty(model, 2, 20), lengths=jnp.array([20]))


def test_parameter_names_and_shapes():
    shapes = parameter_shapes(CASES["attention_bias"])
    assert shapes["embed.embedding"] == (61, 32)
    assert shapes["layers.attention.k_proj.kernel"] == (3, 32, 16)
    assert shapes["layers.attention.k_proj.bias"] == (3, 16)
    assert shapes["layers.mlp.down_proj.kernel"] == (3, 48, 32)
    assert shapes["lm_head.kernel"] == (32, 61)
    assert "lm_head.kernel" not in parameter_shapes(CASES["tied"])
    assert len(shapes) == 16


def test_random_model_has_the_named_parameters_and_no_two_layers_alike():
    model = nnx.jit(lambda: Llama(CASES["default_untied"], rngs=nnx.Rngs(0)))()
    parameters = parameters_of(model)
    assert {name: array.shape for name, array in parameters.items()} == parameter_shapes(model.config)
    first, second, _ = parameters["layers.mlp.up_proj.kernel"]
    assert not jnp.array_equal(first, second)


def test_parameters_go_in_and_come_out_unchanged():
    config = CASES["attention_bias"]
    given = {name: jnp.asarray(array) for name, array in tiny_parameters(config).items()}
    returned = parameters_of(from_parameters(config, given))
    assert returned.keys() == given.keys()
    assert all(returned[name] is given[name] for name in given)


def test_parameters_that_do_not_fit_are_all_named_at_once():
    parameters = tiny_parameters(CASES["default_untied"])
    del parameters["final_norm.scale"]
    parameters["surprise"] = np.zeros(3, np.float32)
    parameters["embed.embedding"] = parameters["embed.embedding"].T
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        from_parameters(CASES["default_untied"], parameters)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "misshapen: embed.embedding is [32, 61], the model needs [61, 32]",
        "missing: final_norm.scale",
        "unknown: surprise",
    ]


def test_parameters_of_several_dtypes_are_refused():
    parameters = tiny_parameters(CASES["default_untied"])
    parameters["final_norm.scale"] = parameters["final_norm.scale"].astype(np.float16)
    with pytest.raises(ValueError, match="one dtype, got float16, float32"):
        from_parameters(CASES["default_untied"], parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 .*turns 7 dimensions: they must be pairs"),
        ({"num_layers": 0}, "num_layers=0 must be an integer of at least 1"),
        ({"vocab_size": 61.0}, "vocab_size=61.0 must be an integer"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASES["default_untied"], **changes)

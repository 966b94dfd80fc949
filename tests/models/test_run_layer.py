"""Layers one at a time: what they give is what the whole model gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.families import our_config
from goldens.tiny_models import tiny_parameters

from minference_jax.cache import init_cache
from minference_jax.models import dense_attend, from_parameters

TOKENS = np.random.default_rng(5).integers(0, 61, (2, 20)).astype(np.int32)
LENGTHS = np.array([20, 13], np.int32)


@functools.partial(jax.jit, static_argnames="graph")
def layer_by_layer(graph, state, tokens, lengths):
    model = nnx.merge(graph, state)
    x, seen = model.embed(tokens), []
    for index in range(model.config.num_layers):
        x, aux = model.run_layer(index, x, lengths, watched, jnp.int32(index))
        seen.append(aux)
    x = model.final_norm(jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0])
    return x, seen


def watched(q, k, v, layer_input, **where):
    return dense_attend(q, k, v, None, **where)[0], layer_input


@pytest.mark.parametrize("name", ["qwen2", "glm4", "phi3_longrope_long"])
def test_layers_one_at_a_time_give_the_logits_of_the_whole_model(name):
    config = our_config(name)
    model = from_parameters(config, tiny_parameters(config))
    x, seen = layer_by_layer(*nnx.split(model), TOKENS, LENGTHS)
    logits = model.embed.logits(x) if model.lm_head is None else x @ model.lm_head.kernel[...]
    sizes = (config.num_layers, 2, 20, config.num_kv_heads, config.head_dim)
    expected, _, _ = model(jnp.asarray(TOKENS), init_cache(*sizes, jnp.float32), lengths=jnp.asarray(LENGTHS))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    assert [int(index) for index in seen] == list(range(config.num_layers))


def test_a_layer_that_does_not_exist_is_refused():
    config = our_config("qwen2")
    model = from_parameters(config, tiny_parameters(config))
    with pytest.raises(ValueError, match=f"layer {config.num_layers} is not one of 0 to {config.num_layers - 1}"):
        model.run_layer(config.num_layers, model.embed(TOKENS), jnp.asarray(LENGTHS), dense_attend)

"""A layer's work on single tokens goes over a long prompt piece by piece, and gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minference_jax.cache import init_cache
from minference_jax.models import Glm, GlmConfig, Llama, LlamaConfig, layers

BATCH, COUNT = 2, 40
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 4096,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


def program(model, at_once, monkeypatch):
    """A compiled call of the model, with the arrays that it takes."""
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", at_once)
    graph, state = nnx.split(model)
    tokens = jnp.arange(BATCH * COUNT, dtype=jnp.int32).reshape(BATCH, COUNT) % SHAPE["vocab_size"]
    cache = init_cache(SHAPE["num_layers"], BATCH, COUNT, SHAPE["num_kv_heads"], SHAPE["head_dim"], jnp.float32)
    arrays = (state, tokens, cache)
    call = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state)(tokens, cache))
    return call.lower(*arrays).compile(), arrays


@pytest.mark.parametrize("at_once", [8, 32], ids=["whole pieces", "a rest"])
@pytest.mark.parametrize(
    "model",
    [
        Llama(LlamaConfig(**SHAPE, qkv_bias=True, o_bias=True), rngs=nnx.Rngs(0)),
        Glm(GlmConfig(**SHAPE, output_norms=True), rngs=nnx.Rngs(1)),
    ],
    ids=["llama", "glm"],
)
def test_pieces_give_what_all_at_once_gives_in_less_memory(model, at_once, monkeypatch):
    whole, arrays = program(model, BATCH * COUNT, monkeypatch)
    pieces, _ = program(model, at_once, monkeypatch)
    for expected, found in zip(*(jax.tree.leaves(call(*arrays)) for call in (whole, pieces)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    wide = 4 * SHAPE["intermediate_size"]  # bytes that the MLP's inside takes for a token
    saved = whole.memory_analysis().temp_size_in_bytes - pieces.memory_analysis().temp_size_in_bytes
    assert saved > 0.9 * (BATCH * COUNT - at_once) * wide

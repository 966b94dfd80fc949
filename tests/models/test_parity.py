"""Our models against the PyTorch models of transformers: committed numbers always, live where torch is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import families, tiny_models

from minference_jax.cache import init_cache
from minference_jax.generate import LanguageModel
from minference_jax.models import from_parameters
from minference_jax.patterns import VerticalSlash

LOGITS_RELATIVE = 1e-4  # float32 sums in another order, over three layers; measured about 3e-6
SHORT = ("default_untied", "qwen3", "phi3_longrope_long", "glm4")  # the others are left out by -m "not slow"


CASES = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow)
        for name in [*tiny_models.CASES, *families.CASES]
    ],
)


def config_of(name):
    return families.our_config(name) if name in families.CASES else tiny_models.CASES[name]


@functools.partial(jax.jit, static_argnames=("graph", "new_tokens"))
def run(graph, state, prompt, cache, new_tokens):
    def step(carry, _):
        token, cache = carry
        logits, cache, _ = nnx.merge(graph, state)(token[:, None], cache)
        return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), token

    logits, cache, _ = nnx.merge(graph, state)(prompt, cache, logits="all")
    first = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
    _, tokens = jax.lax.scan(step, (first, cache), length=new_tokens)
    return logits[0], tokens[:, 0]


def logits_and_greedy(config, parameters, prompt, new_tokens):
    """Logits of every prompt token, and the greedy continuation through cache and decode step."""
    capacity = len(prompt) + new_tokens
    cache = init_cache(config.num_layers, 1, capacity, config.num_kv_heads, config.head_dim, jnp.float32)
    graph, state = nnx.split(from_parameters(config, parameters))
    logits, tokens = run(graph, state, jnp.asarray(prompt)[None], cache, new_tokens)
    return np.asarray(logits), tokens.tolist()


def assert_same(ours, theirs):
    (logits, tokens), (expected_logits, expected_tokens) = ours, theirs
    error = np.abs(logits - expected_logits).max() / np.abs(expected_logits).max()
    assert error <= LOGITS_RELATIVE
    np.testing.assert_array_equal(logits.argmax(-1), expected_logits.argmax(-1))
    assert tokens == expected_tokens


@CASES
def test_logits_and_greedy_tokens_equal_the_committed_ones_of_pytorch(name):
    config = config_of(name)
    parameters, prompt = tiny_models.tiny_parameters(config), tiny_models.tiny_prompt(config)
    ours = logits_and_greedy(config, parameters, prompt, tiny_models.NEW_TOKENS)
    assert_same(ours, tiny_models.read_golden(name))


@CASES
def test_logits_and_greedy_tokens_equal_live_pytorch(name):
    pytest.importorskip("torch", reason="the live comparison needs torch: pip install torch")
    from goldens import reference

    config = config_of(name)
    # other weights than the committed numbers have, so that the two tests are not one
    parameters = {key: value[::-1].copy() for key, value in tiny_models.tiny_parameters(config).items()}
    prompt = tiny_models.tiny_prompt(config)[::-1].copy()
    if name in families.CASES:
        model = reference.build_family(families.CASES[name], config, parameters)
    else:
        model = reference.build(config, parameters)
    theirs = reference.logits_and_greedy(model, prompt, tiny_models.NEW_TOKENS)
    assert_same(logits_and_greedy(config, parameters, prompt, tiny_models.NEW_TOKENS), theirs)


def test_committed_tokens_show_that_dynamic_rope_depends_on_the_length():
    default, crossing = (tiny_models.read_golden(name)[1] for name in ("default_untied", "dynamic_crossing"))
    limit = tiny_models.CASES["dynamic_crossing"].max_position_embeddings - tiny_models.PROMPT_LENGTH
    assert default[:limit] == crossing[:limit]
    assert default != crossing


@pytest.mark.parametrize("name", SHORT)
def test_attention_that_keeps_everything_gives_the_logits_of_dense_attention(name):
    config = config_of(name)
    model = LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)), stop_tokens=())
    prompt = tiny_models.tiny_prompt(config)
    everything = VerticalSlash(vertical_size=len(prompt), slash_size=len(prompt))
    dense = model.prefill(prompt, attention="dense")
    sparse = model.prefill(prompt, attention="vertical_slash", pattern=everything)
    error = np.abs(sparse.logits - dense.logits).max() / np.abs(dense.logits).max()
    assert error <= LOGITS_RELATIVE
    new_tokens = 16
    answers = [model.complete(prefilled, max_new_tokens=new_tokens)[0].tokens for prefilled in (dense, sparse)]
    assert answers[0] == answers[1] == tuple(tiny_models.read_golden(name)[1][:new_tokens])

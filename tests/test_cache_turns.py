"""Caches that keep every token: sparse questions behind them, and prompts that are read into them in chunks."""

import cached_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_model import BOUNDS, CLOSE, DENSE, MORE, PROMPTS, TOKENS
from flax import nnx

from minference_jax import compile_ahead
from minference_jax.cache import POLICIES, init_cache, policy_of
from minference_jax.cache.policy import unpacked
from minference_jax.generate import programs
from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash

pytestmark = pytest.mark.usefixtures("oracle_first")

model, plain = cached_model.model, cached_model.plain  # fixtures
HEADS = (AShape(sink_size=5, window_size=20), BlockSparse(num_blocks=1), VerticalSlash(vertical_size=30, slash_size=50))
SPARSE = {
    "attention": "minference",
    "pattern": ModelPatterns(layers=((*HEADS, Dense()), (Dense(), *HEADS)), source="a test"),
}
BOTH = pytest.mark.parametrize("how", [DENSE, SPARSE], ids=["dense", "sparse"])
QUANTISED = pytest.mark.parametrize("name", ["int8", "fp8"])


@pytest.fixture(scope="module")
def expected(model, plain):
    asked = model.extend(plain, MORE, **SPARSE)
    return asked, model.extend(asked, MORE, **SPARSE)


@pytest.mark.parametrize("name", [*BOUNDS, "host"])
def test_sparse_questions_are_those_of_the_plain_cache_within_a_bound(model, plain, expected, name):
    bound = BOUNDS.get(name, CLOSE["atol"])
    prefilled = model.prefill(PROMPTS, kv_cache=name, **DENSE)
    asked = model.extend(prefilled, MORE, **SPARSE)
    twice = model.extend(asked, MORE, **SPARSE)
    for ours, theirs in zip((asked, twice), expected, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, rtol=0, atol=bound)
        np.testing.assert_allclose(ours.density, theirs.density, rtol=1e-5)
        assert ours.cache.length.tolist() == theirs.cache.length.tolist()
    dense = model.extend(prefilled, MORE)
    assert np.abs(asked.logits - dense.logits).max() > 1.5 * bound  # it is sparse
    assert asked.cache.prompt is prefilled.cache  # and copies nothing


def test_a_named_implementation_reads_what_our_own_reads(model):
    prefilled = model.prefill(PROMPTS, kv_cache="int8", **DENSE)
    named = model.extend(prefilled, MORE, implementation="xla")
    np.testing.assert_allclose(named.logits, model.extend(prefilled, MORE).logits, **CLOSE)
    assert named.density is None


@BOTH
@QUANTISED
def test_a_chunk_reads_those_before_it_as_they_are_kept_and_itself_as_it_is(model, name, how):
    prompts = [TOKENS[:250], TOKENS[300:560]]  # the second ends in the third chunk
    first = model.prefill([row[:128] for row in prompts], kv_cache=name, **how)
    second = model.extend(first, [row[128:250] for row in prompts], **how)
    chunked = model.prefill([prompts[0], prompts[0][:20]], chunk_size=128, kv_cache=name, **how)
    np.testing.assert_allclose(chunked.logits[0], second.logits[0], **CLOSE)
    layers = [jnp.int32(layer) for layer in range(2)]
    kept, alone = (
        np.array([unpacked(x.cache.block(layer, 0, 128), jnp.float32) for layer in layers])[:, :, 0]
        for x in (chunked, first)
    )
    step = {"int8": 1, "fp8": 32}[name] * max(chunked.cache.k_scale.max(), chunked.cache.v_scale.max())
    np.testing.assert_allclose(kept, alone, rtol=0, atol=1.01 * float(step))  # a last bit may round to the next number


@QUANTISED
def test_chunks_are_near_one_read_and_answered_alike(model, name):
    prompts = [TOKENS[:300], TOKENS[20:120]]
    plain = model.prefill(prompts, **DENSE)
    whole, chunked = (model.prefill(prompts, kv_cache=name, chunk_size=size, **DENSE) for size in (None, 128))
    np.testing.assert_allclose(chunked.logits, whole.logits, rtol=0, atol=BOUNDS[name])
    assert np.abs(chunked.logits[0] - plain.logits[0]).max() > 1e-3  # later chunks have read small numbers
    np.testing.assert_allclose(chunked.logits[1], plain.logits[1], **CLOSE)  # of one chunk
    assert chunked.cache.length.tolist() == [300, 100]
    assert (chunked.cache.kind, chunked.cache.capacity) == (name, 384)
    asked = [model.extend(read, [[5, 6], [7]]) for read in (whole, chunked)]
    np.testing.assert_allclose(asked[1].logits, asked[0].logits, rtol=0, atol=BOUNDS[name])


@QUANTISED
def test_a_chunk_writes_out_one_layer_at_a_time(name):
    taken = []
    for num_layers in (1, 8):
        other = cached_model.of_layers(num_layers)
        (chunk,) = compile_ahead(other, [40_000], chunk_size=128, kv_cache=name, implementation="xla", **DENSE)
        taken.append(chunk.output_bytes + chunk.temporary_bytes)
        assert chunk.argument_bytes > num_layers * 40_960 * 2 * 2 * (8 + 4)  # tokens, KV heads, k and v, bytes
    assert abs(taken[1] - taken[0]) < 100_000  # a layer of numbers has 655,360 for keys alone


@QUANTISED
def test_a_sparse_question_writes_out_one_layer_at_a_time(name):
    taken = []
    for num_layers in (1, 8):
        other = cached_model.of_layers(num_layers)
        sizes = (num_layers, 1, 40_960, 2, 8, np.float32)
        prompt, tail = jax.eval_shape(
            lambda sizes=sizes: (POLICIES[name].empty(*sizes), init_cache(*sizes[:2], 128, *sizes[3:]))
        )
        attend, arrays = other.choose(40_960, "a_shape", HEADS[0], "line", "xla", False)
        rows, tokens = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((1,), (1, 128)))
        given = (*nnx.split(other.model), tokens, rows, prompt, tail, arrays, attend)
        memory = programs.read_behind.lower(*given).compile().memory_analysis()
        taken.append(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    assert abs(taken[1] - taken[0]) < 600_000  # a layer of numbers has 655,360 for keys alone


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("k", jnp.float8_e4m3fn, "cache.k and cache.v must both be int8 or uint8, got float8_e4m3fn and uint8"),
        ("v_scale", jnp.bfloat16, r"cache.v_scale must be float32\["),
    ],
)
def test_arrays_that_are_no_quantised_cache_are_refused_in_one_sentence(model, name, dtype, message):
    decoder, config = model.model, model.config
    sizes = (config.num_layers, 1, 16, config.num_kv_heads, config.head_dim)
    cache = policy_of("fp8").empty(*sizes, decoder.dtype)
    cache = cache._replace(**{name: getattr(cache, name).astype(dtype)})
    with pytest.raises(ValueError, match=message):
        decoder(jnp.ones((1, 4), jnp.int32), cache)

"""Prefill in chunks and sparse extension: where the kept sets are equal, the result is that of reading all at once.

Patterns are data and two rows are read wherever it does not matter, so that few programs are compiled.
"""

import dataclasses

import numpy as np
import pytest
from goldens import families, tiny_models

from minference_jax.cache import extend_cache
from minference_jax.generate import LanguageModel
from minference_jax.models import Llama, from_parameters
from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash

pytestmark = pytest.mark.usefixtures("oracle_first")  # kernels are compared with it, at offsets too, in test_attention

CONFIG = dataclasses.replace(tiny_models.CASES["default_untied"], num_layers=2, max_position_embeddings=1024)
TOKENS = np.random.default_rng(5).integers(0, 61, 600).astype(np.int32)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = [(0, 128), (128, 256), (256, 300)]  # the chunks of 300 tokens


def patterns(*heads):
    return {"attention": "minference", "pattern": ModelPatterns(layers=(heads, heads[::-1]), source="a test")}


DENSE = {"attention": "dense"}
SAME_KEPT = patterns(  # whatever the chunks: slash_size keeps every distance
    AShape(sink_size=5, window_size=70),
    BlockSparse(num_blocks=2),
    VerticalSlash(vertical_size=30, slash_size=1024),
    Dense(),
)
ESTIMATED = patterns(
    *[VerticalSlash(vertical_size=30, slash_size=50)] * 2, BlockSparse(num_blocks=1), AShape(sink_size=1, window_size=2)
)
BOTH = pytest.mark.parametrize("how", [DENSE, SAME_KEPT], ids=["dense", "sparse"])


def reader(config):
    return LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)))


@pytest.fixture(scope="module")
def model():
    return reader(CONFIG)


def read_by_hand(model, how):
    """Gives each result of reading 300 tokens of a row chunk by chunk, beside a row of 300 and then a token each."""
    (_, end), *rest = STEPS
    results = [model.prefill([TOKENS[:end], TOKENS[:300]], chunk_size=128, **how)]
    for length, (begin, end) in enumerate(rest, 300):
        results.append(model.extend(results[-1], [TOKENS[begin:end], TOKENS[length : length + 1]], **how))
    return results


@BOTH
@pytest.mark.parametrize("second", [100, 256])  # ends in the first chunk; ends with a chunk
def test_chunks_give_what_one_read_gives_where_the_same_is_kept(model, how, second):
    prompts = [TOKENS[:300], TOKENS[20 : 20 + second]]
    whole, chunked = model.prefill(prompts, **how), model.prefill(prompts, chunk_size=128, **how)
    np.testing.assert_allclose(chunked.logits, whole.logits, **CLOSE)
    assert chunked.cache.length.tolist() == [300, second]
    for row, length in enumerate((300, second)):
        for ours, theirs in ((chunked.cache.k, whole.cache.k), (chunked.cache.v, whole.cache.v)):
            np.testing.assert_allclose(ours[:, row, :length], theirs[:, row, :length], **CLOSE)
    if how is SAME_KEPT and second == 100:
        np.testing.assert_allclose(chunked.density[:, 1], whole.density[:, 1], rtol=1e-5)  # of a row of a single chunk


def test_answers_after_chunks_are_those_after_one_read(model):
    how = DENSE | {"max_new_tokens": 3}
    prompts = [TOKENS[:300], TOKENS[20:120]]
    assert model.generate(prompts, chunk_size=128, **how) == model.generate(prompts, **how)
    with pytest.raises(ValueError, match="chunk_size=5 must be"):
        model.generate(prompts, chunk_size=5, **how)


def test_a_chunk_keeps_what_its_own_last_queries_ask_for(model):
    chunked = model.prefill([TOKENS[:300], TOKENS[:20]], chunk_size=128, **ESTIMATED)
    by_hand = read_by_hand(model, ESTIMATED)[-1]
    np.testing.assert_allclose(chunked.logits[0], by_hand.logits[0], **CLOSE)
    dense = model.prefill([TOKENS[:300], TOKENS[:20]], **DENSE)
    assert np.abs(chunked.logits[0] - dense.logits[0]).max() > 0.01


def test_density_is_the_mean_of_the_chunks_weighted_by_dense_work(model):
    steps = [np.asarray(read.density[:, 0]) for read in read_by_hand(model, SAME_KEPT)]
    pairs = [end * (end + 1) - begin * (begin + 1) for begin, end in STEPS]
    expected = sum(work * density for work, density in zip(pairs, steps, strict=True)) / sum(pairs)
    chunked = model.prefill([TOKENS[:300], TOKENS[:20]], chunk_size=128, **SAME_KEPT)
    np.testing.assert_allclose(chunked.density[:, 0], expected, rtol=1e-5)
    assert steps[-1][0, 0] < expected[0, 0] < steps[0][0, 0]  # the A-shape's
    assert model.prefill([TOKENS[:300], TOKENS[:20]], chunk_size=128, **DENSE).density is None


def test_one_program_reads_all_chunks_of_all_lengths_of_a_bucket(monkeypatch):
    shapes, call = [], Llama.__call__
    other = reader(dataclasses.replace(CONFIG, num_layers=1))  # no other test's programs

    def counted(self, tokens, cache, **options):
        shapes.append((*tokens.shape, getattr(cache, "capacity", 0)))  # 0: the cache is made of these tokens
        return call(self, tokens, cache, **options)

    monkeypatch.setattr(Llama, "__call__", counted)
    for length in (600, 520):
        other.prefill(TOKENS[:length], chunk_size=256, **DENSE)
    assert shapes == [(1, 256, 768)]  # a bucket of 640, filled up to whole chunks
    other.prefill(TOKENS[:100], chunk_size=256, **DENSE)
    assert shapes[1:] == [(1, 128, 0)]


@pytest.mark.parametrize("name", ["dynamic_long", "phi3_longrope_long"])
def test_chunks_are_turned_for_the_length_of_the_whole_prompt(name):
    if name == "dynamic_long":
        config = dataclasses.replace(tiny_models.CASES[name], max_position_embeddings=64)
    else:
        config = families.our_config(name)
        rope = dataclasses.replace(config.rope, original_max_position_embeddings=140)  # in the second chunk
        config = dataclasses.replace(config, rope=rope, max_position_embeddings=512)
    stretched = reader(dataclasses.replace(config, num_layers=1))
    prompts = [TOKENS[:200] % config.vocab_size, TOKENS[:130] % config.vocab_size]
    whole, chunked = (stretched.prefill(prompts, chunk_size=size, **DENSE) for size in (None, 128))
    np.testing.assert_allclose(chunked.logits, whole.logits, **CLOSE)
    np.testing.assert_allclose(chunked.cache.k[:, 0, :200], whole.cache.k[:, 0, :200], **CLOSE)


@pytest.mark.parametrize("chunk_size", [0, -128, 64, 200, 128.0, True, "128"])
def test_chunks_are_multiples_of_128_tokens(model, chunk_size):
    with pytest.raises(ValueError, match="must be None or a multiple of 128 tokens"):
        model.prefill(TOKENS[:300], chunk_size=chunk_size, **DENSE)


@BOTH
def test_extension_is_a_prefill_of_all_where_the_same_is_kept(model, how):
    extended, whole = read_by_hand(model, how)[-1], model.prefill([TOKENS[:300], TOKENS[:302]], **how)
    rows = slice(None) if how is DENSE else slice(1)  # blocks of queries begin elsewhere in the second
    np.testing.assert_allclose(extended.logits[rows], whole.logits[rows], **CLOSE)
    assert (extended.density is None) == (how is DENSE)


def test_extension_is_dense_where_nothing_is_asked_for_and_sparse_where_it_is(model):
    first, *_ = read_by_hand(model, DENSE)
    more = [TOKENS[128:256], TOKENS[300:310]]
    by_default, dense, sparse = (model.extend(first, more, **how) for how in ({}, DENSE, ESTIMATED))
    np.testing.assert_array_equal(by_default.logits, dense.logits)
    assert by_default.density is None
    assert np.abs(sparse.logits - dense.logits).max() > 0.01
    assert sparse.density.shape == (2, 2, 4)
    assert sparse.density.min() < 1


def test_a_prefill_in_chunks_can_be_extended_though_its_cache_is_larger_than_a_bucket(model):
    chunked = model.prefill([TOKENS[:140], TOKENS[:20]], chunk_size=128, **DENSE)
    larger = chunked._replace(cache=extend_cache(chunked.cache, 384))  # 268 tokens have a bucket of 320
    extended = model.extend(larger, [TOKENS[140:150], TOKENS[20:30]])
    assert extended.cache.capacity == 384
    whole = model.prefill([TOKENS[:300], TOKENS[:30]], **DENSE)
    np.testing.assert_allclose(extended.logits[1], whole.logits[1], **CLOSE)


def test_impossible_attention_of_an_extension_is_refused(model):
    first = model.prefill([TOKENS[:128], TOKENS[:64]], **DENSE)
    with pytest.raises(ValueError, match="attention='a_shape' needs pattern=AShape"):
        model.extend(first, [[1], [2]], attention="a_shape")
    with pytest.raises(NotImplementedError, match="cudnn"):
        model.extend(first, [[1], [2]], implementation="cudnn")

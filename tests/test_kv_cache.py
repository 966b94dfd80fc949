"""Cache policies: each answers as the plain cache to a stated bound, and reads exactly what it says that it keeps."""

import cached_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_model import BOUNDS, CLOSE, DENSE, MORE, PROMPTS, TOKENS

from minference_jax import compile_ahead
from minference_jax.cache import (
    POLICIES,
    Host,
    KVCache,
    Plain,
    PyramidKV,
    Quantised,
    SnapKV,
    StreamingLLM,
    attend_split,
    host,
    policy_of,
    quantisation_error,
    split,
)
from minference_jax.cache.policy import unpacked

SMALL = {
    "snapkv": SnapKV(capacity=40, window_size=8),
    "pyramidkv": PyramidKV(capacity=40, window_size=8, beta=4),
    "streaming_llm": StreamingLLM(sink_size=5, recent_size=35),
}
model, plain = cached_model.model, cached_model.plain  # fixtures
NOT_PLAIN = pytest.mark.parametrize("name", [name for name in POLICIES if name != "plain"])


@pytest.fixture(scope="module")
def expected(model, plain):
    return model.extend(plain, MORE)


@NOT_PLAIN
def test_questions_and_answers_are_those_of_the_plain_cache_within_a_bound(model, plain, expected, name):
    prefilled = model.prefill(PROMPTS, kv_cache=name, **DENSE)
    np.testing.assert_allclose(prefilled.logits, plain.logits, **CLOSE)  # the prompt is read exactly
    for _ in range(2):  # and stays usable
        asked = model.extend(prefilled, MORE)
        np.testing.assert_allclose(asked.logits, expected.logits, rtol=0, atol=BOUNDS.get(name, CLOSE["atol"]))
    assert asked.cache.length.tolist() == [230, 75]
    if name not in BOUNDS:
        options = {"max_new_tokens": 4, "stop_tokens": []}
        assert model.complete(prefilled, **options) == model.complete(plain, **options)
        assert model.complete(asked, **options) == model.complete(expected, **options)
        twice, as_plain = (model.extend(x, [TOKENS[:1], TOKENS[:2]]) for x in (asked, expected))
        np.testing.assert_allclose(twice.logits, as_plain.logits, **CLOSE)


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.012), ("fp8", 0.035)])
def test_the_error_of_quantising_is_told_and_within_half_a_step(model, plain, name, bound):
    cache = model.prefill(PROMPTS, kv_cache=name, **DENSE).cache
    error = quantisation_error(cache, plain.cache)
    for relative in (error.k, error.v):
        assert relative.shape == (2,)
        assert 0 < relative.min() <= relative.max() < bound
    assert (cache.k.dtype, cache.v_scale.dtype) == ("int8" if name == "int8" else "uint8", jnp.float32)
    layers = [unpacked(cache.block(jnp.int32(layer), 0, cache.capacity), jnp.float32)[0] for layer in range(2)]
    half = 0.5 if name == "int8" else 16.0  # steps of float8_e4m3fn below its largest are 32
    off = np.abs(np.stack(layers) - plain.cache.k)[:, 0, :200]
    assert np.all(off <= half * 1.001 * np.asarray(cache.k_scale)[:, 0, :200, :, None])
    np.testing.assert_allclose(error.k_largest[0], max(off[0].max(), error.k_largest[0]))
    with pytest.raises(ValueError, match="not of one prefill"):
        quantisation_error(cache, jax.tree.map(lambda x: x[:1], plain.cache))


def naive_kept(q, k, length, policy, layer):
    """Positions that each KV head of one row keeps, written down from the method, in NumPy and float64."""
    capacity = 40
    if length <= capacity:
        return [list(range(length))] * k.shape[1]
    if isinstance(policy, StreamingLLM):
        return [[*range(5), *range(length - 35, length)]] * k.shape[1]
    budget = capacity - 8 if isinstance(policy, SnapKV) else (56, 8)[layer]  # 2 x 32 - 32 / 4, and 32 / 4
    kept = []
    for head in range(k.shape[1]):
        mass = np.zeros(length - 8)
        for query in range(2 * head, 2 * head + 2):  # of its group
            for row in range(length - 8, length):
                scores = np.float64(k[: row + 1, head]) @ np.float64(q[row, query]) * 8**-0.5
                shares = np.exp(scores - scores.max())
                mass += (shares / shares.sum())[: length - 8]
        pooled = np.convolve(mass, np.ones(5), mode="same")
        others = np.argsort(-pooled, kind="stable")[:budget]
        kept.append([*sorted(others.tolist()), *range(length - 8, length)])
    return kept


@pytest.mark.parametrize("name", SMALL)
def test_what_is_kept_is_what_the_method_says(name):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, 128, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    lengths = [120, 40, 90]
    for layer in range(2):
        where = {"lengths": jnp.array(lengths), "layer": jnp.int32(layer), "num_layers": 2, "scale": 8**-0.5}
        keys, values, positions, counts = SMALL[name].keep(q, k, v, **where)
        for row, length in enumerate(lengths):
            kept = naive_kept(q[row], k[row], length, SMALL[name], layer)
            for head, own in enumerate(kept):
                assert counts[row] == len(own)
                assert positions[row, : len(own), head].tolist() == own
                np.testing.assert_array_equal(keys[row, : len(own), head], k[row, own, head])
                np.testing.assert_array_equal(values[row, : len(own), head], v[row, own, head])


@pytest.mark.parametrize("name", SMALL)
def test_decoding_attends_to_the_kept_tokens_and_the_tail_alone(monkeypatch, name):
    monkeypatch.setattr(split, "_MOST_SLOTS", 16)  # several blocks, the last of them overlapping
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 64, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    new_q, tail_k, tail_v = (rng.standard_normal((2, size, heads, 8)) for size, heads in ((3, 4), (7, 2), (7, 2)))
    lengths, used, counts = jnp.array([61, 30]), jnp.array([2, 4]), jnp.array([3, 2])
    where = {"lengths": lengths, "num_layers": 2, "scale": 8**-0.5}
    layers = [SMALL[name].keep(q, k, v, layer=jnp.int32(layer), **where) for layer in range(2)]
    stored = SMALL[name].stored(jax.tree.map(lambda *x: jnp.stack(x), *layers), lengths)
    tail = KVCache(*(jnp.asarray(x, jnp.float32)[None].repeat(2, 0) for x in (tail_k, tail_v)), used)
    out = attend_split(jnp.asarray(new_q, jnp.float32), stored, tail, jnp.int32(1), scale=8**-0.5, count=counts)
    for row, head, step in np.ndindex(2, 4, 2):
        own = naive_kept(q[row], k[row], int(lengths[row]), SMALL[name], 1)[head // 2]
        seen = int(used[row]) + step + 1
        keys, values = (
            np.concatenate([x[row, own, head // 2], t[row, :seen, head // 2]]) for x, t in ((k, tail_k), (v, tail_v))
        )
        scores = keys @ new_q[row, step, head] * 8**-0.5
        shares = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[row, step, head], shares @ values / shares.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_compression_changes_later_answers_and_takes_fewer_slots(model, plain, expected, name):
    prefilled = model.prefill(PROMPTS, kv_cache=SMALL[name], **DENSE)
    np.testing.assert_allclose(prefilled.logits, plain.logits, **CLOSE)
    assert prefilled.cache.capacity == {"snapkv": 40, "pyramidkv": 64, "streaming_llm": 40}[name]
    assert prefilled.cache.counts.tolist() == ([[64, 64], [16, 16]] if name == "pyramidkv" else [[40, 40]] * 2)
    asked = model.extend(prefilled, MORE)
    assert asked.cache.length.tolist() == [230, 75]
    assert np.abs(asked.logits - expected.logits).max() > 0.01


@pytest.mark.parametrize("name", ["plain", "int8", "fp8"])
def test_a_step_of_decoding_copies_nothing_of_the_size_of_a_layer(model, name):
    prefill, decode = compile_ahead(model, [100_000], max_new_tokens=10, kv_cache=name, **DENSE)
    a_layer = prefill.output_bytes / 2
    assert decode.argument_bytes > 2 * a_layer
    assert decode.output_bytes + decode.temporary_bytes < a_layer


def test_programs_of_a_policy_are_compiled_ahead(model):
    names = [(one.name, one.length) for one in compile_ahead(model, [200], max_new_tokens=9, kv_cache="int8", **DENSE)]
    assert names == [("prefill", 224), ("decode", 224 + 128)]


def test_layers_in_host_memory_lie_there(model):
    cache = model.prefill(PROMPTS, kv_cache=Host(), **DENSE).cache
    assert {x.sharding.memory_kind for x in (*cache.k, *cache.v)} == {"pinned_host"}
    assert len(cache.k) == 2


def test_a_device_without_host_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(host, "KIND", "a_kind_that_no_device_has")
    with pytest.raises(NotImplementedError, match=r"kv_cache='host' needs pinned host memory, which .* does not have"):
        model.prefill(PROMPTS, kv_cache="host", **DENSE)


def test_what_can_not_be_right_is_refused(model):
    for name in ("host", "snapkv"):
        with pytest.raises(
            ValueError, match=f"a prefill in chunks takes kv_cache='plain', 'int8' or 'fp8'; '{name}' is"
        ):
            model.prefill(PROMPTS, kv_cache=name, chunk_size=128, **DENSE)
    with pytest.raises(ValueError, match="kv_cache='int4' must be a cache policy or one of plain, int8, fp8, host"):
        model.prefill(PROMPTS, kv_cache="int4", **DENSE)
    with pytest.raises(NotImplementedError, match="can't be compiled ahead"):
        compile_ahead(model, [200], kv_cache="host", **DENSE)
    compressed = model.prefill(PROMPTS, kv_cache="streaming_llm", **DENSE)
    for how in ({"attention": "minference"}, {"attention": "dense", "implementation": "xla"}):
        with pytest.raises(
            ValueError, match="has left out tokens of its prompts: read on with attention='dense' and no"
        ):
            model.extend(compressed, MORE, **how)
    with pytest.raises(ValueError, match=r"made by LanguageModel.prefill, not by a call"):
        model.model(jnp.ones((1, 4), jnp.int32), Host())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantised("int4"), "dtype='int4' of a quantised cache must be one of int8, float8_e4m3fn"),
        (lambda: SnapKV(capacity=32), "window_size=32 must be below capacity=32"),
        (lambda: SnapKV(pool_size=4), "pool_size=4 odd"),
        (lambda: PyramidKV(beta=0), "beta=0 must be an integer of at least 1"),
        (lambda: StreamingLLM(sink_size=1.5), "sink_size=1.5 must be an integer"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_policies_have_the_sizes_of_their_authors():
    assert policy_of("snapkv") == SnapKV(capacity=4096, window_size=32, pool_size=5)
    assert policy_of("streaming_llm") == StreamingLLM(sink_size=128, recent_size=3968)
    assert policy_of(Plain()) == policy_of("plain")
    assert [policy.name for policy in POLICIES.values()] == list(POLICIES)
    budgets = policy_of("pyramidkv").budgets(32)
    assert (budgets[0], budgets[-1]) == (32 + 2 * 4064 - 203, 32 + 203)
    assert abs(budgets.mean() - 4096) < 1

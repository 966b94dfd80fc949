"""One suite over all implementations: each case against the oracle on exactly the pairs the layout keeps."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import MIXED, arrays, make
from interpreted import interpreted_triton
from tolerances import LSE, kernel_bound

from minference_jax import attention, implementations
from minference_jax.index import build_layout
from minference_jax.kernels import reference
from minference_jax.kernels.layouts import layout_mask
from minference_jax.patterns import AShape, BlockSparse, Dense, VerticalSlash

INTERPRETED = interpreted_triton()
EVERYWHERE = ["xla", pytest.param("triton", marks=pytest.mark.gpu)]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", EVERYWHERE)
AND_INTERPRETED = pytest.mark.parametrize("implementation", [*EVERYWHERE, INTERPRETED.name])


@pytest.fixture(autouse=True)
def _with_interpreted_triton(monkeypatch):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", (*implementations.IMPLEMENTATIONS, INTERPRETED))


def per_sequence(value, batch):
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))


@functools.partial(jax.jit, static_argnames=("tiles", "kernels", "slash_granularity"))
def _kept_pairs(q, k, pattern, kv_len, q_offset, tiles, kernels, slash_granularity):
    where = {"kv_len": kv_len, "q_offset": q_offset, "tiles": tiles}
    how = {"max_num_blocks": 128, "max_num_columns": k.shape[1], "kernels": kernels}
    how |= {"scale": q.shape[-1] ** -0.5, "slash_granularity": slash_granularity}
    layout = build_layout(q, k, pattern, **how, **where)
    return layout_mask(layout, q_offset, kv_len, q.shape[1], k.shape[1], tiles)


def kept_pairs(q, k, pattern, kv_len, q_offset, implementation, slash_granularity="line"):
    """The pairs that an implementation keeps, with the tiles and the estimation that it chooses."""
    (entry,) = (entry for entry in implementations.IMPLEMENTATIONS if entry.name == implementation)
    tiles = entry.tiles(implementations.device_of(q), q.shape[3], q.dtype.itemsize)
    return _kept_pairs(q, k, pattern, kv_len, q_offset, tiles, entry.estimate, slash_granularity)


def causal_pairs(B, T, S, kv_len, q_offset):
    position = per_sequence(q_offset, B)[:, None] + jnp.arange(T)
    length = per_sequence(kv_len, B)[:, None]
    seen = (jnp.arange(S) <= position[..., None]) & (jnp.arange(S) < length[..., None])
    return (seen & (position < length)[..., None])[:, None]


CASES = {
    "unaligned": {"T": 333, "K": 1},
    "shorter than a tile": {"T": 30, "K": 4},
    "one token": {"T": 1},
    "one token over a tile": {"T": 65, "H": 128},
    "batch of unequal lengths": {"T": 200, "B": 3, "kv_len": [200, 77, 0], "H": 64, "dtype": "bfloat16"},
    "chunk at an offset": {"T": 100, "S": 300, "q_offset": 170, "kv_len": 270, "H": 96},
    "chunks of a batch": {"T": 90, "S": 320, "B": 2, "q_offset": [7, 200], "kv_len": [97, 260], "H": 80}
    | {"dtype": "float16"},
    "last chunk of an exact cache": {"T": 91, "S": 128, "q_offset": 37},
    "one query over a cache": {"T": 1, "S": 200, "q_offset": 150, "kv_len": 151, "H": 256},
    "many tiles and runs": {"T": 1000, "N": 3, "K": 1},
}


SHORT = ("batch of unequal lengths", "chunks of a batch", "one query over a cache")
"""Cases for Pallas' interpreter, which takes seconds for each, and for a quick run."""


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(SHORT, ["xla"]),
        *(pytest.param(name, "xla", marks=pytest.mark.slow) for name in CASES if name not in SHORT),
        *itertools.product(SHORT, [INTERPRETED.name]),
        *(pytest.param(name, "triton", marks=pytest.mark.gpu) for name in CASES),
    ],
)
def test_sparse_and_dense_equal_the_oracle_on_the_kept_pairs(name, implementation):
    case = dict(CASES[name])
    q_offset, kv_len = case.pop("q_offset", 0), case.pop("kv_len", None)
    q, k, v = make(**case)
    B, T, N, H = q.shape
    S = k.shape[1]
    kv_len = per_sequence(S if kv_len is None else kv_len, B)
    q_offset = per_sequence(q_offset, B)
    pattern = arrays(*(MIXED * N)[:N])
    where = {"kv_len": kv_len, "q_offset": q_offset, "return_lse": True, "implementation": implementation}
    sparse = attention.sparse_attention(q, k, v, pattern, **where)
    dense = attention.dense_attention(q, k, v, **where)
    causal = jnp.broadcast_to(causal_pairs(B, T, S, kv_len, q_offset), (B, N, T, S))
    kept = kept_pairs(q, k, pattern, kv_len, q_offset, implementation)
    for (out, lse), mask in ((sparse, kept), (dense, causal)):
        assert out.dtype == q.dtype
        plain, _ = reference.attention(q, k, v, mask, scale=H**-0.5)
        exact, exact_lse = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask, scale=H**-0.5)
        error = np.abs(np.asarray(out, np.float64) - np.asarray(exact, np.float64)).max(initial=0.0)
        assert error <= kernel_bound(plain.astype(jnp.float32), exact, q.dtype)
        np.testing.assert_allclose(lse, exact_lse, rtol=LSE, atol=LSE)  # -inf on padding on both sides


@AND_INTERPRETED
def test_block_granularity_equals_the_oracle_on_its_kept_pairs(implementation):
    q, k, v = make(T=190, S=330)
    pattern, where = arrays(*MIXED), {"kv_len": per_sequence(310, 1), "q_offset": per_sequence(120, 1)}
    out, lse = attention.sparse_attention(
        q, k, v, pattern, slash_granularity="block", return_lse=True, implementation=implementation, **where
    )
    mask = kept_pairs(q, k, pattern, **where, implementation=implementation, slash_granularity="block")
    exact, exact_lse = reference.attention(q, k, v, mask, scale=16**-0.5)
    np.testing.assert_allclose(out, exact, atol=2e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE, atol=LSE)


@IMPLEMENTATIONS
@pytest.mark.parametrize("q_offset", [1, 37, 64])
def test_heads_that_become_dense_lose_no_key_in_the_last_chunk_of_an_exact_cache(q_offset, implementation):
    q, k, v = make(T=128 - q_offset, S=128)
    everything = VerticalSlash(vertical_size=128, slash_size=128)
    out = attention.sparse_attention(q, k, v, everything, q_offset=q_offset, implementation=implementation)
    causal = jnp.broadcast_to(causal_pairs(1, q.shape[1], 128, 128, q_offset), (1, 4, q.shape[1], 128))
    np.testing.assert_allclose(out, reference.attention(q, k, v, causal, scale=0.25)[0], atol=2e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("granularity", ["line", "block"])
def test_sizes_beyond_any_sequence_keep_everything(granularity, implementation):
    q, k, v = make(T=90)
    huge = 2**31 - 1
    pattern = arrays(
        VerticalSlash(vertical_size=huge, slash_size=huge),
        AShape(sink_size=4, window_size=huge),
        AShape(sink_size=huge, window_size=1),
        BlockSparse(num_blocks=huge),
    )
    out = attention.sparse_attention(q, k, v, pattern, slash_granularity=granularity, implementation=implementation)
    np.testing.assert_allclose(out, attention.dense_attention(q, k, v, implementation="xla"), atol=2e-6)


@IMPLEMENTATIONS
def test_traced_lengths_beyond_the_cache_read_nothing_outside_it(implementation):
    q, k, v = make(T=70)
    run = functools.partial(attention.dense_attention, q, k, v, implementation=implementation)
    np.testing.assert_array_equal(jax.jit(lambda n: run(kv_len=n))(jnp.int32(500)), run())


@IMPLEMENTATIONS
@pytest.mark.parametrize("length", [1, 200])
def test_all_columns_and_slashes_kept_equals_dense(length, implementation):
    q, k, v = make(T=length)
    everything = VerticalSlash(vertical_size=length, slash_size=length)
    out = attention.sparse_attention(q, k, v, everything, implementation=implementation)
    np.testing.assert_allclose(out, attention.dense_attention(q, k, v, implementation=implementation), atol=2e-6)


@IMPLEMENTATIONS
def test_output_ignores_future_keys(implementation):
    q, k, v = make()
    where = {"kv_len": 200, "q_offset": 0, "implementation": implementation}
    for pattern in (AShape(sink_size=5, window_size=70), Dense()):
        out = attention.sparse_attention(q, k, v, pattern, **where)
        changed = [x.at[:, 120:].add(7.0) for x in (k, v)]
        np.testing.assert_array_equal(attention.sparse_attention(q, *changed, pattern, **where)[:, :120], out[:, :120])


@IMPLEMENTATIONS
def test_output_ignores_keys_beyond_kv_len(implementation):
    q, k, v = make()
    pattern = arrays(*MIXED)
    run = functools.partial(attention.sparse_attention, kv_len=130, implementation=implementation)
    garbage = [x.at[:, 130:].set(jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(run(q, k, v, pattern)[:, :130], run(q, *garbage, pattern)[:, :130])


@IMPLEMENTATIONS
def test_a_nan_that_is_read_shows(implementation):
    q, k, v = make()
    k = k.at[:, 100].set(jnp.nan)
    pattern = AShape(sink_size=5, window_size=70)
    out, lse = attention.sparse_attention(q, k, v, pattern, return_lse=True, implementation=implementation)
    for result in (out.sum(axis=(0, 2, 3)), lse.sum(axis=(0, 2))):
        np.testing.assert_array_equal(np.isnan(result), np.isin(np.arange(q.shape[1]), np.arange(100, 170)))


@IMPLEMENTATIONS
def test_padding_rows_are_zero_with_lse_of_minus_infinity(implementation):
    q, k, v = make()
    out, lse = attention.sparse_attention(
        q, k, v, arrays(*MIXED), kv_len=130, return_lse=True, implementation=implementation
    )
    assert (np.asarray(out)[:, 130:] == 0).all()
    assert np.isneginf(np.asarray(lse)[:, 130:]).all()
    assert np.isfinite(np.asarray(lse)[:, :130]).all()


@IMPLEMENTATIONS
def test_gqa_equals_repeated_kv(implementation):
    q, k, v = make()
    pattern = arrays(*MIXED)
    repeated = [jnp.repeat(x, 2, axis=2) for x in (k, v)]
    for run in (functools.partial(attention.sparse_attention, pattern=pattern), attention.dense_attention):
        run = functools.partial(run, implementation=implementation)
        np.testing.assert_allclose(run(q, k, v), run(q, *repeated), atol=2e-6)


@IMPLEMENTATIONS
def test_batch_of_unequal_lengths_equals_each_sequence_alone(implementation):
    q, k, v = make(T=200, B=2)
    pattern, lengths = arrays(*MIXED), [200, 77]
    run = functools.partial(attention.sparse_attention, implementation=implementation)
    together = run(q, k, v, pattern, kv_len=jnp.asarray(lengths))
    for i, length in enumerate(lengths):
        alone = run(*(x[i : i + 1, :length] for x in (q, k, v)), pattern)
        np.testing.assert_allclose(together[i, :length], alone[0], atol=2e-6)


@IMPLEMENTATIONS
def test_chunks_at_offsets_equal_one_shot_where_the_kept_set_does_not_depend_on_the_chunk(implementation):
    q, k, v = make()
    pattern = arrays(AShape(sink_size=5, window_size=70), Dense(), AShape(sink_size=1, window_size=1), Dense())
    run = functools.partial(attention.sparse_attention, pattern=pattern, implementation=implementation)
    whole = run(q, k, v)
    for start, end in ((0, 100), (100, 200)):
        chunk = run(q[:, start:end], k, v, q_offset=start, kv_len=end)
        np.testing.assert_allclose(chunk, whole[:, start:end], atol=2e-6)


@IMPLEMENTATIONS
def test_keys_beyond_a_chunk_do_not_change_what_is_estimated_for_it(implementation):
    q, k, v = make()
    run = functools.partial(attention.sparse_attention, pattern=arrays(*MIXED), implementation=implementation)
    chunk = q[:, 30:130]
    np.testing.assert_array_equal(run(chunk, k, v, q_offset=30), run(chunk, k, v, q_offset=30, kv_len=130))


@IMPLEMENTATIONS
def test_one_block_on_an_unaligned_chunk_keeps_both_blocks_of_its_own(implementation):
    q, k, v = make()
    run = functools.partial(attention.block_sparse_attention, num_blocks=1, q_offset=30, implementation=implementation)
    chunk = q[:, 30:130]
    np.testing.assert_array_equal(run(chunk, k, v), run(chunk, k, v, max_num_blocks=8))


def test_lengths_may_be_lists():
    q, k, v = make(B=2)
    expected = attention.dense_attention(q, k, v, kv_len=jnp.array([200, 77]))
    np.testing.assert_array_equal(attention.dense_attention(q, k, v, kv_len=[200, 77]), expected)


@IMPLEMENTATIONS
def test_vmap_over_the_batch_equals_the_batch(implementation):
    q, k, v = make(T=100, B=2)
    run = functools.partial(attention.sparse_attention, pattern=arrays(*MIXED), implementation=implementation)
    one = jax.vmap(lambda q, k, v, n: run(q[None], k[None], v[None], kv_len=n)[0])
    lengths = jnp.array([100, 60])
    np.testing.assert_allclose(one(q, k, v, lengths), run(q, k, v, kv_len=lengths), atol=2e-6)


@IMPLEMENTATIONS
def test_public_ops_equal_sparse_attention_with_their_pattern(implementation):
    q, k, v = make()
    same = {"implementation": implementation}
    pairs = [
        (attention.a_shape_attention(q, k, v, sink_size=5, window_size=70, **same), MIXED[1]),
        (attention.vertical_slash_attention(q, k, v, vertical_size=40, slash_size=110, **same), MIXED[0]),
        (attention.block_sparse_attention(q, k, v, num_blocks=3, **same), MIXED[2]),
    ]
    for out, pattern in pairs:
        np.testing.assert_array_equal(out, attention.sparse_attention(q, k, v, pattern, **same))


def test_another_pattern_does_not_compile_again():
    q, k, v = make(T=64)
    traces = []

    @jax.jit
    def run(q, k, v, pattern):
        traces.append(1)
        return attention.sparse_attention(q, k, v, pattern)

    run(q, k, v, arrays(*MIXED))
    run(q, k, v, arrays(*MIXED[::-1]))
    assert len(traces) == 1


def test_density_is_one_for_dense_heads_and_never_above_for_vertical_slash():
    q, k, v = make()
    heads = (Dense(), VerticalSlash(vertical_size=200, slash_size=200), AShape(sink_size=1, window_size=1), MIXED[0])
    _, density = attention.sparse_attention(q, k, v, arrays(*heads), return_density=True)
    density = np.asarray(density)[0]
    assert density[0] == density[1] == 1.0
    assert density[2] < 0.5
    assert density[3] <= 1.0


def test_block_granularity_never_keeps_more_tiles_than_contiguous_lines_need():
    q, k, v = make(T=1500, N=2, K=1)
    shares = {}
    for granularity in ("line", "block"):
        call = functools.partial(attention.vertical_slash_attention, vertical_size=30, slash_size=300)
        _, shares[granularity] = call(q, k, v, slash_granularity=granularity, return_density=True)
    assert (shares["block"] <= shares["line"]).all()


PEAK = """
import jax, jax.numpy as jnp
from minference_jax import VerticalSlash, sparse_attention
from minference_jax.measure import peak_memory
q, k, v = (jax.random.normal(jax.random.key(i), (1, 32768, n, 64)) for i, n in enumerate((9, 3, 3)))
out = sparse_attention(q, k, v, VerticalSlash(vertical_size=500, slash_size=100))
assert bool(jnp.isfinite(out).all())
print(peak_memory()[0])
"""


@pytest.mark.slow
def test_32k_tokens_and_9_heads_stay_under_4_gib_of_host_memory():
    done = subprocess.run([sys.executable, "-P", "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 2**30

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from minference_jax import estimate
from minference_jax.kernels.mass_xla import attention_mass
from minference_jax.kernels.select_xla import top_k_mask
from minference_jax.kernels.tiles import TileConfig

N, K, H = 4, 2, 16


def random_qk(length, seed=0, q_len=None):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((1, q_len or length, N, H)), rng.standard_normal((1, length, K, H))
    return q.astype(np.float32), k.astype(np.float32)


def brute_force_scores(q, k, q_offset, length):
    """Sums over the last 64 queries written as loops: per key and per distance, [N, S] each."""
    size = k.shape[1]
    verticals, slashes = np.zeros((N, size)), np.zeros((N, size))
    for n in range(N):
        for i in range(max(length - 64, q_offset, 0), length):
            scores = k[0, : i + 1, n // (N // K)].astype(np.float64) @ q[0, i - q_offset, n] / H**0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            verticals[n, : i + 1] += weights
            slashes[n, : i + 1] += weights[::-1]
    return verticals, slashes


@pytest.mark.parametrize(
    ("length", "capacity", "q_offset"), [(300, 300, 0), (211, 256, 0), (40, 64, 0), (1, 1, 0), (250, 256, 200)]
)
def test_scores_equal_brute_force_sums_over_keys_and_diagonals(length, capacity, q_offset):
    q, k = random_qk(capacity, q_len=capacity - q_offset)
    rows, positions = estimate.last_queries(jnp.asarray(q), jnp.array([q_offset]), jnp.array([length]))
    found = attention_mass(rows, jnp.asarray(k), positions, scale=H**-0.5)
    for got, expected in zip(found, brute_force_scores(q, k, q_offset, length), strict=True):
        np.testing.assert_allclose(np.asarray(got)[0], expected, atol=2e-5)


def choose(length, vertical_size, slash_size, capacity=None):
    q, k = random_qk(capacity or length)
    sizes = [jnp.full((N,), size) for size in (vertical_size, slash_size)]
    lengths = {"q_offset": jnp.array([0]), "kv_len": jnp.array([length])}
    kept = estimate.vertical_slash(
        jnp.asarray(q), jnp.asarray(k), vertical_size=sizes[0], slash_size=sizes[1], scale=H**-0.5, **lengths
    )
    return np.asarray(kept.verticals)[0], np.asarray(kept.slashes)[0], brute_force_scores(q, k, 0, length)


def test_the_heaviest_keys_and_distances_are_kept_behind_the_forced_ones():
    verticals, slashes, (by_key, by_distance) = choose(400, 60, 150)
    for kept, scores, forced, size in ((verticals, by_key, 30, 60), (slashes, by_distance, 100, 150)):
        for n in range(N):
            rest = np.argsort(-scores[n, forced:], kind="stable")[: size - forced] + forced
            assert set(np.flatnonzero(kept[n])) == {*range(forced), *rest.tolist()}


def test_slash_size_100_is_exactly_the_100_nearest_distances():
    _, slashes, _ = choose(400, 30, 100)
    np.testing.assert_array_equal(slashes, np.broadcast_to(np.arange(400) < 100, slashes.shape))


def test_small_sizes_grow_to_30_verticals_and_50_slashes():
    verticals, slashes, _ = choose(400, 1, 1)
    np.testing.assert_array_equal(verticals, np.broadcast_to(np.arange(400) < 30, verticals.shape))
    np.testing.assert_array_equal(slashes, np.broadcast_to(np.arange(400) < 50, slashes.shape))


@pytest.mark.parametrize("length", [1, 20, 70])
def test_sizes_above_the_length_keep_every_valid_key_and_no_other(length):
    verticals, slashes, _ = choose(length, 10_000, 10_000, capacity=96)
    for kept in (verticals, slashes):
        np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(96) < length, kept.shape))


@settings(max_examples=60)
@given(
    scores=arrays.arrays(
        np.float32,
        (2, 23),
        elements=st.one_of(
            st.sampled_from([-np.inf, np.inf, 0.0, -0.0]),
            st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
        ),
    ),
    k=st.tuples(st.integers(0, 23), st.integers(0, 23)),
)
def test_top_k_mask_marks_the_k_largest_and_of_equals_the_first(scores, k):
    got = np.asarray(top_k_mask(jnp.asarray(scores), jnp.asarray(k)))
    for row, values, size in zip(got, scores, k, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-values, kind="stable")[:size].tolist())


@pytest.mark.parametrize(("q_offset", "length", "q_len"), [(0, 500, 512), (128, 400, 300), (100, 512, 412), (0, 1, 1)])
def test_block_sparse_keeps_the_heaviest_block_means_the_first_and_the_diagonal(q_offset, length, q_len):
    size, blocks, capacity = 512, [1, 2, 3, 8], 8
    q, k = random_qk(size, seed=3)
    q = q[:, :q_len]
    found = estimate.block_sparse(
        jnp.asarray(q),
        jnp.asarray(k),
        num_blocks=jnp.asarray(blocks),
        capacity=capacity,
        scale=1.0,
        q_offset=jnp.array([q_offset]),
        kv_len=jnp.array([length]),
        tiles=TileConfig(),
    )
    ids, counts = np.asarray(found.block_ids)[0], np.asarray(found.block_counts)[0]
    for n in range(N):
        for t in range(ids.shape[1]):
            start, end = q_offset + 64 * t, min(q_offset + min(64 * (t + 1), q_len), length)
            if start >= length:
                continue
            mean = q[0, start - q_offset : end - q_offset, n].mean(axis=0)
            visible = [b for b in range(8) if 64 * b < end]
            means = [k[0, 64 * b : min(64 * (b + 1), length), n // 2].mean(axis=0) @ mean for b in visible]
            forced = {0, *range(start // 64, (end - 1) // 64 + 1)}
            order = [b for b in np.argsort(-np.array(means), kind="stable").tolist() if b not in forced]
            expected = sorted(forced | set(order[: max(blocks[n] - len(forced), 0)]))
            assert ids[n, t, : counts[n, t]].tolist() == expected


@pytest.mark.parametrize(("length", "capacity"), [(600, 600), (333, 400), (40, 64)])
def test_block_diagonals_are_the_heaviest_that_the_verticals_leave_behind_the_forced_ones(length, capacity):
    q, k = random_qk(capacity, seed=5)
    sizes = {"vertical_size": jnp.full((N,), 40), "slash_size": jnp.full((N,), 270)}
    where = {"q_offset": jnp.array([0]), "kv_len": jnp.array([length]), "scale": H**-0.5}
    kept = estimate.vertical_slash(jnp.asarray(q), jnp.asarray(k), **sizes, **where, slash_block=64)
    verticals, slashes = np.asarray(kept.verticals)[0], np.asarray(kept.slashes)[0]
    by_key, _ = brute_force_scores(q, k, 0, length)
    assert slashes.shape == (N, estimate.num_diagonals(capacity, 64))
    for n in range(N):
        left = np.where(verticals[n], 0.0, by_key[n])
        begins = [length - 64 - 64 * d for d in range(slashes.shape[1])]
        mass = [left[max(begin, 0) : max(begin + 64, 0)].sum() for begin in begins]
        reachable = [d for d in range(slashes.shape[1]) if (d - 1) * 64 < length]
        order = sorted(reachable, key=lambda d, mass=mass: (d > 2, -mass[d] if d > 2 else 0, d))
        # 270 nearest distances of 64 queries lie in six blocks; 100, which are forced, in three
        assert set(np.flatnonzero(slashes[n])) == set(order[:6])

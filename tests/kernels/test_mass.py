import functools

import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.kernels import mass_triton, mass_xla

N, K = 4, 2
KERNELS = pytest.mark.parametrize(
    "attention_mass",
    [
        mass_xla.attention_mass,
        functools.partial(mass_triton.attention_mass, interpret=True),
        pytest.param(mass_triton.attention_mass, marks=pytest.mark.gpu),
    ],
    ids=["xla", "triton interpreted", "triton"],
)


def brute_force(q, k, positions, scale):
    """Loops over sequences, heads and queries."""
    by_key, by_distance = np.zeros((2, q.shape[0], N, k.shape[1]))
    for b, row, n in np.ndindex(*q.shape[:3]):
        position = positions[b, row]
        if position >= 0:
            scores = k[b, : position + 1, n // (N // K)] @ q[b, row, n] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            by_key[b, n, : position + 1] += weights
            by_distance[b, n, : position + 1] += weights[::-1]
    return by_key, by_distance


@KERNELS
@pytest.mark.parametrize(
    ("size", "last", "head_dim"),
    [(300, (299, 180), 64), (70, (69, 20), 80), (1300, (1299, -1), 16), (100, (99, 63), 72)],
)
def test_weights_are_summed_over_keys_and_distances(attention_mass, size, last, head_dim):
    rng = np.random.default_rng(size)
    q, k = rng.standard_normal((2, 64, N, head_dim)), rng.standard_normal((2, size, K, head_dim))
    positions = np.maximum(np.array(last)[:, None] - 63 + np.arange(64), -1)
    inputs = jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), jnp.asarray(positions, jnp.int32)
    for got, expected in zip(attention_mass(*inputs, scale=-0.2), brute_force(q, k, positions, -0.2), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_heads_that_go_one_group_after_another_give_the_same_sums(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, n, heads, 16)), jnp.float32) for n, heads in ((64, N), (200, K)))
    sums = functools.partial(mass_triton.attention_mass, scale=0.3, interpret=True)
    positions = jnp.arange(136, 200, dtype=jnp.int32)[None]
    together = sums(q, k, positions)
    monkeypatch.setattr(mass_triton, "SCORE_BYTES", 1)
    for got, expected in zip(sums(q, k, positions), together, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)

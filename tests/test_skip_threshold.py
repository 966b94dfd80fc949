"""Tiles that are left out by `skip_threshold`: the rule, its bound, and what may have no say in it."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_triton

from minference_jax import attention, implementations
from minference_jax.kernels import flash_xla
from minference_jax.kernels.tiles import TileConfig

TILE = 32
"""Queries and keys, those that suit a GPU in float32, too."""
LATE = 512
"""Rows from here on see the first keys as columns alone, whatever the tiles."""
INTERPRETED = interpreted_triton(TileConfig(block_q=TILE, block_kv=TILE))
EVERYWHERE = ["xla", INTERPRETED.name, pytest.param("triton", marks=pytest.mark.gpu)]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", EVERYWHERE)
RUNS = pytest.mark.parametrize("run", [attention.dense_attention, attention.a_shape_attention])


@pytest.fixture(autouse=True)
def _with_interpreted_triton(monkeypatch):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", (*implementations.IMPLEMENTATIONS, INTERPRETED))


def make(T=160, N=2, K=2, H=16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, T, n, H)), jnp.float32) for n in (N, K, K)]


def by_the_rule(q, k, v, threshold, nearest_first):
    """Causal attention of one head, tile by tile, in float64: output, log-sum-exp, and how many pairs a row skips."""
    outs, lses, skipped = [], [], []
    position = np.arange(TILE)
    for start in range(0, len(q), TILE):
        keys = list(range(0, start + 1, TILE))
        top, total, out, left = np.full(TILE, -500.0), np.zeros(TILE), np.zeros((TILE, v.shape[1])), np.zeros(TILE)
        for key in reversed(keys) if nearest_first else keys:
            scores = q[start : start + TILE] @ k[key : key + TILE].T
            scores = np.where(start + position[:, None] >= key + position, scores, -np.inf)
            if (np.exp(scores - top[:, None]) < threshold).all():
                left += TILE
                continue
            new = np.maximum(top, scores.max(axis=1))
            weights, decay = np.exp(scores - new[:, None]), np.exp(top - new)
            out, total = out * decay[:, None] + weights @ v[key : key + TILE], total * decay + weights.sum(axis=1)
            top = new
        outs.append(out / total[:, None])
        lses.append(top + np.log(total))
        skipped.append(left)
    return [np.concatenate(x) for x in (outs, lses, skipped)]


def small_flash(monkeypatch):
    """Dense attention in pure JAX with tiles of these sizes."""
    monkeypatch.setattr(flash_xla, "WIDTH", TILE)
    monkeypatch.setattr(flash_xla, "ROWS", TILE)

    def run(q, k, v, **how):
        lengths = {"q_offset": jnp.zeros(1, jnp.int32), "kv_len": jnp.full(1, q.shape[1])}
        return flash_xla.attention(q, k, v, tiles=TileConfig(), **lengths, **how)

    return run


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_tiles_are_left_out_by_the_rule_and_the_error_is_within_its_bound(implementation, monkeypatch):
    q, k, v = make()
    levels = jnp.repeat(jnp.array([0.0, -5.0, 1.0, -6.0, -4.0]), TILE)  # of the tiles, among noise
    q, k = (0.3 * q).at[..., 0].set(2.0), k.at[..., 0].set(levels[:, None])
    threshold, scale = 0.25, 0.4
    if implementation == "xla":
        run = small_flash(monkeypatch)
    else:
        run = functools.partial(attention.dense_attention, return_lse=True, implementation=implementation)
    out, lse = run(q, k, v, scale=scale, skip_threshold=threshold)
    exact, exact_lse = run(q, k, v, scale=scale, skip_threshold=None)
    for head in range(q.shape[2]):
        one = [np.asarray(x[0, :, head], np.float64) for x in (q * scale, k, v)]
        expected, expected_lse, skipped = by_the_rule(*one, threshold, nearest_first=implementation != "xla")
        assert 0 < skipped.sum() < 0.4 * len(skipped) ** 2
        np.testing.assert_allclose(out[0, :, head], expected, atol=5e-6)
        np.testing.assert_allclose(lse[0, :, head], expected_lse, atol=5e-6)
        most = skipped * threshold
        ranges = np.maximum.accumulate(one[2]) - np.minimum.accumulate(one[2])
        error = np.abs(np.asarray(out - exact, np.float64)[0, :, head])
        assert (error <= (most / (1 + most))[:, None] * ranges + 5e-6).all()
        fall = np.asarray(exact_lse - lse, np.float64)[0, :, head]
        assert (fall > -5e-6).all()
        assert (fall <= np.log1p(most) + 5e-6).all()
        assert error.max() > 1e-3


def peaked():
    """Inputs whose first 4 keys weigh nothing but to themselves: next to the others, exp(-16) of them."""
    q, k, v = make(T=600)
    return q.at[..., 0].set(8.0), k.at[..., 0].set(4.0).at[:, :4, :, 0].set(-4.0), v


def a_shape(q, k, v, *, kv_len=600, **how):
    return attention.a_shape_attention(q, k, v, sink_size=4, window_size=200, kv_len=kv_len, q_offset=0, **how)


@IMPLEMENTATIONS
def test_what_is_left_out_does_not_show_and_without_a_threshold_it_does(implementation):
    q, k, v = peaked()
    run = functools.partial(a_shape, implementation=implementation)
    huge = v.at[:, :4].set(1e30)
    assert (np.abs(run(q, k, huge)) > 1e20).all()
    found, expected = run(q, k, huge, skip_threshold=1e-4), run(q, k, v)
    np.testing.assert_allclose(found[:, LATE:], expected[:, LATE:], atol=1e-5)
    for padding in (-8.0, jnp.nan):  # such queries heed the first keys alone, or nothing at all, and have no say
        padded = q.at[:, 590:, :, 0].set(padding)
        found = run(padded, k, huge, skip_threshold=1e-4, kv_len=590)
        np.testing.assert_allclose(found[:, LATE:590], expected[:, LATE:590], atol=1e-5)


@IMPLEMENTATIONS
def test_a_score_of_nan_is_not_left_out(implementation):
    q, k, v = peaked()
    k = k.at[:, 1].set(jnp.nan)
    for result in a_shape(q, k, v, skip_threshold=1e-4, return_lse=True, implementation=implementation):
        assert np.isnan(result[:, 1:]).all()


@IMPLEMENTATIONS
def test_a_threshold_that_nothing_lies_below_changes_nothing(implementation):
    run = functools.partial(attention.dense_attention, *make(T=90), return_lse=True, implementation=implementation)
    for found, expected in zip(run(skip_threshold=1e-30), run(), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


@RUNS
@pytest.mark.parametrize("threshold", [0, 1, -0.1, math.nan, True, "0.5", jnp.float32(0.5)])
def test_thresholds_that_make_no_sense_are_refused(run, threshold):
    with pytest.raises(ValueError, match=r"skip_threshold=.* must be a Python number above 0 and below 1"):
        run(*make(T=8), skip_threshold=threshold)

"""Rotary embedding: what a config may say, and the frequencies against transformers' where torch is installed."""

import jax.numpy as jnp
import numpy as np
import pytest
from goldens.tiny_models import CASES

from minference_jax.models.rope import RopeConfig, inverse_frequencies, rotate, rotation_angles

YARN_64K = RopeConfig(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
LLAMA_31 = RopeConfig(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
NONE = jnp.zeros((1,), jnp.int32)


@pytest.mark.parametrize("rope", [RopeConfig(rope_theta=100000.0), LLAMA_31, YARN_64K], ids=lambda rope: rope.rope_type)
def test_frequencies_of_full_size_models_equal_those_of_transformers(rope):
    pytest.importorskip("torch", reason="the live comparison needs torch: pip install torch")
    from goldens import reference

    ours, factor = inverse_frequencies(rope, 128, 131072, NONE)
    theirs, expected_factor = reference.inverse_frequencies(rope, 128, 131072)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)  # two roundings of float32
    assert factor == pytest.approx(expected_factor)


def test_linear_rope_at_a_multiple_of_the_factor_is_default_rope():
    positions = jnp.arange(5)[None]
    linear = rotation_angles(RopeConfig(rope_type="linear", factor=4.0), 16, 64, positions * 4, NONE)
    default = rotation_angles(RopeConfig(), 16, 64, positions, NONE)
    np.testing.assert_allclose(linear, default, atol=1e-6)


def test_dynamic_rope_is_default_rope_up_to_the_models_context():
    rope = RopeConfig(rope_type="dynamic", factor=4.0)
    frequencies, _ = inverse_frequencies(rope, 16, 64, jnp.array([5, 64, 65]))
    default, _ = inverse_frequencies(RopeConfig(), 16, 64, NONE)
    np.testing.assert_allclose(frequencies[:2], [default, default], rtol=1e-6)
    assert jnp.all(frequencies[2, 1:] < default[1:] * 0.999)


def test_rotation_turns_pairs_half_a_head_apart_and_keeps_their_length():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    cos, sin = rotation_angles(RopeConfig(), 8, 64, jnp.arange(3)[None], NONE)
    turned = np.asarray(rotate(jnp.asarray(x), cos, sin))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    pairs = x[..., :4] + 1j * x[..., 4:]
    expected = pairs * (np.asarray(cos) + 1j * np.asarray(sin))[:, :, None]
    np.testing.assert_allclose(turned[..., :4] + 1j * turned[..., 4:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "ntk"}, "rope_type='ntk' is not supported; the supported types are default, linear"),
        (
            {"rope_type": "longrope", "short_factor": (1.0,)},
            "rope_type='longrope' needs original_max_position_embeddings",
        ),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0 must lie above 0"),
        ({"rope_type": "linear"}, "rope_type='linear' needs factor"),
        ({"factor": 2.0}, "rope_type='default' does not use factor=2.0"),
        ({"rope_type": "dynamic", "factor": 2.0, "beta_fast": 32.0}, "does not use beta_fast=32.0"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor=-1.0 of rope_type='yarn' must be positive"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}, "beta_fast=0.5 must not be below beta_slow=1"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor=4.0 must exceed low_freq_factor=4.0",
        ),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
    ],
)
def test_impossible_rope_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**fields)


def test_every_rope_type_has_a_parity_case():
    assert {config.rope.rope_type for config in CASES.values()} == {"default", "linear", "dynamic", "llama3", "yarn"}

"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import jax
import numpy as np

from minference_jax import AShape, Dense

FOLDER = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layer_of_the_custom_attention_example_takes_other_patterns_without_compiling_again(monkeypatch, capsys):
    layer = example("custom_attention")
    weights = layer.init_weights(jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (1, 256, layer.HIDDEN))
    lengths = np.array([200], np.int32)
    dense = layer.patterns_of_layer(*[Dense()] * layer.NUM_HEADS)
    narrow = layer.patterns_of_layer(*[AShape(sink_size=1, window_size=8)] * layer.NUM_HEADS)
    full, full_density = layer.attention_layer(weights, x, lengths, dense)
    part, part_density = layer.attention_layer(weights, x, lengths, narrow)
    assert layer.attention_layer._cache_size() == 1
    np.testing.assert_array_equal(full_density, 1)
    assert np.all(part_density < 1)
    np.testing.assert_allclose(full[:, :8], part[:, :8], atol=1e-5)
    assert np.abs(full - part).max() > 1e-3
    assert not full[:, 200:].any()


def test_custom_attention_example_runs(capsys):
    example("custom_attention").main()
    assert "mixed: out (2, 2048, 256)" in capsys.readouterr().out

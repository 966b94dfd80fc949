"""Models of true shape whose random weights are made where they are needed, and models with fewer layers."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from minference_jax.bench.inputs import normal
from minference_jax.generate import LanguageModel
from minference_jax.models import DecoderConfig, from_parameters, parameter_shapes, parameters_of, quantize_parameters
from minference_jax.models.fp8 import check_linear, is_quantized
from minference_jax.models.layers import INIT_SCALE
from minference_jax.patterns import ModelPatterns
from minference_jax.tile_table import TileTable


def random_model(
    config: DecoderConfig,
    *,
    dtype: str,
    patterns: ModelPatterns | None,
    tiles: TileTable,
    seed: int = 0,
    linear: str | None = None,
) -> LanguageModel:
    """A model without a tokenizer: norms of one, no biases, all else normal with the models' own deviation.

    Args:
      config: of the model.
      dtype: of weights, activations and cache.
      patterns: of every head; None = the default pattern for every head.
      tiles: measured tile sizes.
      seed: of the weights.
      linear: as in `load`; each weight is quantised as soon as it is made.

    Raises:
      ValueError: patterns of another number of layers or heads, an unknown `linear`.
      MemoryError: the device has too little for the weights.
    """
    check_linear(linear)
    shapes = parameter_shapes(config)
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes)), strict=True))
    widths = {name: 1 if linear and is_quantized(name) else jnp.dtype(dtype).itemsize for name in shapes}
    bytes_needed = sum(widths[name] * math.prod(shape) for name, shape in shapes.items())
    try:
        parameters: dict[str, Array] = {}
        for name, shape in shapes.items():
            one = {name: _parameter(keys[name], name, shape, dtype)}
            parameters |= one if linear is None else quantize_parameters(one)
        jax.block_until_ready(parameters)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"{bytes_needed / 1e9:.1f} GB of weights need more memory than is free") from error
    return LanguageModel(from_parameters(config, parameters), None, patterns, tiles=tiles)


def _parameter(key: Array, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    if name.endswith(".scale"):
        return jnp.ones(shape, dtype)
    if name.endswith(".bias"):
        return jnp.zeros(shape, dtype)
    return _kernel(key, shape, dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _kernel(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    rows = normal(key, (math.prod(shape[:-1]), shape[-1]), dtype)
    return (rows * jnp.asarray(INIT_SCALE, dtype)).reshape(shape)


def first_patterns(patterns: ModelPatterns, count: int) -> ModelPatterns:
    """The patterns of the first `count` layers."""
    scores = None if patterns.scores is None else patterns.scores[:count]
    return replace(patterns, layers=patterns.layers[:count], scores=scores)


def first_layers(model: LanguageModel, count: int) -> LanguageModel:
    """The same model with its first `count` layers only; those that are kept are copied."""
    parameters = {
        name: array[:count] if name.startswith("layers.") else array
        for name, array in parameters_of(model.model).items()
    }
    return LanguageModel(
        from_parameters(replace(model.config, num_layers=count), parameters),
        model.tokenizer,
        first_patterns(model.patterns, count),
        stop_tokens=tuple(model.stop_tokens),
        tiles=model.tiles,
    )

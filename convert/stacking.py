"""From layers read one by one to the stacked arrays that a model is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from minference_jax.convert.hf_weights import STACKED, Parameter, WeightError, layer_key, layers_of
from minference_jax.convert.store import TensorStore
from minference_jax.convert.weight_source import Progress, WeightSource, cast
from minference_jax.models.llama import LlamaConfig
from minference_jax.models.parameters import parameter_shapes

_READ_AT_ONCE = 2**26  # bytes; how many layers of a small tensor are read in one go

Layers = Callable[[str], Iterator[tuple[int | None, np.ndarray]]]  # name -> (layer, one layer's array), each once


def check_store(store: TensorStore, config: LlamaConfig, path: Path) -> None:
    """Raises WeightError where a checkpoint's tensors are not exactly those of its config."""
    needed = {
        layer_key(name, layer): shape if layer is None else shape[1:]
        for name, shape in parameter_shapes(config).items()
        for layer in layers_of(config, name)
    }
    unmatched, missing = sorted(store.tensors.keys() - needed.keys()), sorted(needed.keys() - store.tensors.keys())
    misshapen = {
        key: (info.shape, needed[key])
        for key, info in store.tensors.items()
        if key in needed and info.shape != needed[key]
    }
    if unmatched or missing or misshapen:
        raise WeightError(str(path), unmatched=unmatched, missing=missing, misshapen=misshapen)


def stored_layers(store: TensorStore, config: LlamaConfig) -> Layers:
    """Layers of a parameter from a checkpoint, a few of them read at once where they are small."""

    def layers(name: str) -> Iterator[tuple[int | None, np.ndarray]]:
        wanted = {layer_key(name, layer): layer for layer in layers_of(config, name)}
        keys = list(wanted)
        info = store.tensors[keys[0]]
        step = max(1, _READ_AT_ONCE // max(1, math.prod(info.shape) * info.dtype.itemsize))
        for start in range(0, len(keys), step):
            for key, array in store.read(keys[start : start + step]).items():
                yield wanted[key], array

    return layers


def source_layers(source: WeightSource, parameters: list[Parameter]) -> Layers:
    """Layers of a parameter straight from a source."""

    def layers(name: str) -> Iterator[tuple[int | None, np.ndarray]]:
        for parameter in parameters:
            if parameter.name == name:
                yield parameter.layer, parameter.read(source)

    return layers


def stack(config: LlamaConfig, dtype: np.dtype, layers: Layers, progress: Progress | None) -> dict[str, jax.Array]:
    """All parameters as arrays on the default device, stacked one by one in host memory.

    Args:
        config: of the model.
        dtype: of the arrays.
        layers: reads the layers of a parameter.
        progress: called after every parameter.

    Raises:
        ValueError: a number that dtype can't hold.
    """
    shapes = parameter_shapes(config)
    total, done = sum(map(math.prod, shapes.values())) * dtype.itemsize, 0
    arrays: dict[str, jax.Array] = {}
    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):  # the largest while little else is there
        if name.startswith(STACKED):
            host = np.empty(shapes[name], dtype)
            for layer, array in layers(name):
                host[layer] = cast(array, dtype, name)
        else:
            ((_, array),) = layers(name)
            host = np.ascontiguousarray(cast(array, dtype, name))
        arrays[name] = jax.block_until_ready(jax.device_put(host))
        done += host.nbytes
        if progress is not None:
            progress(done, total, name)
    return {name: arrays[name] for name in shapes}

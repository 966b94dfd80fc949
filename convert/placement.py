"""From parts of parameters, read one by one, to arrays on devices. Each byte is read once, whatever the sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

from minference_jax.convert.hf_names import Parameter, layer_key, layers_of
from minference_jax.convert.hf_weights import WeightError
from minference_jax.convert.store import TensorStore
from minference_jax.convert.weight_source import PART_BYTES, Progress, WeightSource, too_large
from minference_jax.models import DecoderConfig, parameter_shapes, quantize_parameters

_READ_AT_ONCE = 2**26  # bytes; how many layers of a small tensor are read from a checkpoint in one go


class Part(NamedTuple):
    """A part of a parameter as it was read.

    Attributes:
        start: where it begins along each axis of the parameter, layers included.
        array: in the source's dtype; turned round, [out, in], where `is_turned`.
        is_turned: see `array`.
    """

    start: tuple[int, ...]
    array: np.ndarray
    is_turned: bool

    def cut(self, bounds: tuple[tuple[int, int], ...]) -> Part | None:
        """What of it lies in a box of the parameter, starting from the box's corner; None = nothing."""
        shape = self.array.shape[::-1] if self.is_turned else self.array.shape
        shape = (1,) * (len(self.start) - len(shape)) + shape
        edges = [
            (max(begin, low), min(begin + size, high))
            for begin, size, (low, high) in zip(self.start, shape, bounds, strict=True)
        ]
        if any(low >= high for low, high in edges):
            return None
        index = [slice(low - begin, high - begin) for (low, high), begin in zip(edges, self.start, strict=True)]
        index = index[len(index) - self.array.ndim :]
        start = tuple(low - corner for (low, _), (corner, _) in zip(edges, bounds, strict=True))
        return Part(start, self.array[tuple(index[::-1] if self.is_turned else index)], self.is_turned)


Parts = Callable[[str], Iterator[Part]]  # parameter -> its parts, which make it up exactly


def check_store(store: TensorStore, config: DecoderConfig, path: Path) -> None:
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


def stored_parts(store: TensorStore, config: DecoderConfig) -> Parts:
    """Parts of a parameter from a checkpoint: its layers, a few of them read at once where they are small."""

    def parts(name: str) -> Iterator[Part]:
        wanted = {layer_key(name, layer): layer for layer in layers_of(config, name)}
        keys = list(wanted)
        info = store.tensors[keys[0]]
        step = max(1, _READ_AT_ONCE // max(1, info.nbytes))
        for begin in range(0, len(keys), step):
            for key, array in store.read(keys[begin : begin + step]).items():
                yield Part(_corner(wanted[key], array.ndim), array, False)

    return parts


def source_parts(source: WeightSource, parameters: list[Parameter]) -> Parts:
    """Parts of a parameter straight from a source: rows of its layers."""

    def parts(name: str) -> Iterator[Part]:
        for parameter in parameters:
            if parameter.name != name:
                continue
            rows = parameter.stored_shape[0]
            row_bytes = math.prod(parameter.stored_shape[1:]) * source.tensors[parameter.tensor].dtype.itemsize
            step = max(1, PART_BYTES // row_bytes) if source.reads_rows else rows
            for begin in range(0, rows, step):
                stop = min(begin + step, rows)
                array = source.read(parameter.tensor, parameter.start + begin, parameter.start + stop)
                corner = _corner(parameter.layer, array.ndim)
                axis = -1 if parameter.is_kernel else len(corner) - array.ndim
                start = [*corner]
                start[axis] = begin
                yield Part(tuple(start), array, parameter.is_kernel)

    return parts


def _corner(layer: int | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if layer is None else (layer, *(0,) * ndim)


def place(
    config: DecoderConfig,
    dtype: np.dtype,
    parts: Parts,
    progress: Progress | None,
    shardings: Mapping[str, Sharding] | None = None,
    linear: str | None = None,
) -> dict[str, jax.Array]:
    """All parameters as arrays on their devices. Host memory: two parts, and what of them is copied for the devices.

    Args:
        config: of the model.
        dtype: of the arrays.
        parts: reads the parts of a parameter.
        progress: called after every part.
        shardings: of every parameter; None = all on the default device.
        linear: as in `load`; each weight is quantised as soon as it is there, and let go.

    Raises:
        ValueError: a number that dtype can't hold.
    """
    shapes = parameter_shapes(config)
    total, done = sum(map(math.prod, shapes.values())) * dtype.itemsize, 0
    arrays: dict[str, jax.Array] = {}
    default = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):  # the largest while little else is there
        target = _Target(name, shapes[name], dtype, default if shardings is None else shardings[name])
        for part in parts(name):
            target.add(part)
            done += part.array.size * dtype.itemsize
            if progress is not None:
                progress(done, total, name)
        one = {name: target.finish()}
        del target
        arrays |= one if linear is None else quantize_parameters(one)
        del one
    return arrays if linear is not None else {name: arrays[name] for name in shapes}


class _Target:
    """One parameter while its parts arrive: a buffer on each device, for the box of it that lies there.

    Devices with the same box get the same part.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self._name, self._shape, self._dtype, self._sharding = name, shape, dtype, sharding
        self._boxes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        self._buffers: dict[jax.Device, jax.Array] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            box = tuple(side.indices(size)[:2] for side, size in zip(index or (), shape, strict=True))
            self._boxes.setdefault(box, []).append(device)
            self._buffers[device] = jnp.zeros([high - low for low, high in box], dtype, device=device)
        self._previous: list[jax.Array] = []

    def add(self, part: Part) -> None:
        """Copies a part to where it belongs, while the next one is read."""
        lost = []
        for box, devices in self._boxes.items():
            if (cut := part.cut(box)) is None:
                continue
            array, start = np.ascontiguousarray(cut.array), np.array(cut.start, np.int32)
            for device in devices:
                values, largest = _prepare(jax.device_put(array, device), self._dtype, is_turned=cut.is_turned)
                self._buffers[device] = _write(self._buffers[device], values, start)
                lost.append(largest)
        self._wait()
        self._previous = lost

    def finish(self) -> jax.Array:
        """The parameter."""
        self._wait()
        buffers = jax.block_until_ready(list(self._buffers.values()))
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, buffers)

    def _wait(self) -> None:
        """Until the part before this one has arrived, so that no more than two are in memory."""
        for largest in self._previous:
            if largest:
                raise too_large(self._name, float(largest), self._dtype)
        self._previous = []


@partial(jax.jit, static_argnums=1, static_argnames="is_turned")
def _prepare(values: jax.Array, dtype: np.dtype, *, is_turned: bool) -> tuple[jax.Array, jax.Array]:
    """The values in our layout and another dtype, and the largest of them that it can't hold, else 0."""
    rounded = (values.T if is_turned else values).astype(dtype)
    largest = jnp.zeros((), jnp.float32)
    if values.dtype != dtype:
        lost = jnp.isfinite(values.T if is_turned else values) & ~jnp.isfinite(rounded)
        sizes = jnp.abs(values.T if is_turned else values).astype(jnp.float32)
        largest = jnp.max(sizes, where=lost, initial=0)
    return rounded, largest


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """The buffer with the values in it. Not together with `_prepare`: there a CPU turns round four times slower."""
    values = values.reshape((1,) * (whole.ndim - values.ndim) + values.shape)
    return lax.dynamic_update_slice(whole, values, list(start))

"""A prefill as a file, so that a long prefix is read once and questions about it are asked later, in other processes.

One safetensors file: the arrays of the cache by their names there, up to the longest row, `logits` [B, V], and
`density` [L, B, N] of a sparse prefill. Its metadata tell format and version, the model, what kind of cache it is, the
tokens of each row, and a checksum of each array.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minference_jax.cache import HostKV, Quantised, SplitCache, empty_kept, init_cache
from minference_jax.cache.host import check_host_memory, to_host
from minference_jax.generate.language_model import LanguageModel
from minference_jax.generate.programs import PrefillResult
from minference_jax.generate.prompts import bucket_length
from minference_jax.implementations import memory_for
from minference_jax.models.digest import weights_digest

_FORMAT, _VERSION = "minference_jax prefill", 1
_EMPTY: dict[str, Callable[..., Any]] = {
    "plain": init_cache,
    "host": init_cache,
    "int8": Quantised("int8").empty,
    "fp8": Quantised("float8_e4m3fn").empty,
    "kept": empty_kept,
}
"""An empty cache of each kind, from its sizes: what its arrays are. One in host memory is saved as a plain one."""


def save_prefill(prefilled: PrefillResult, path: str | os.PathLike[str], model: LanguageModel) -> None:
    """Writes a prefill to a file that `load_prefill` reads; a save that is killed leaves what was there before.

    What the cache holds, of whatever policy, is kept bit for bit up to the longest row; host memory holds it meanwhile.

    Args:
        prefilled: from `LanguageModel.prefill` or `LanguageModel.extend`; it stays usable.
        path: of the file, in a folder that exists; a file there is replaced. `path` with ".partial" behind it is
            written first.
        model: that read it; its weights' digest goes into the file.

    Raises:
        ValueError: the prefill does not fit the model, or is an extension of one whose cache is not plain.
        OSError: the file can't be written.
    """
    path, cache = Path(path), prefilled.cache
    _check_is_file(path, "written")
    if isinstance(cache, SplitCache):
        raise ValueError(
            "what was read on behind a cache that is not plain can't be saved: save it before it is extended"
        )
    lengths = [int(length) for length in np.asarray(cache.length)]
    slots = min(cache.capacity, max(lengths))
    arrays = {"logits": np.asarray(prefilled.logits), **_arrays(cache, slots)}
    if prefilled.density is not None:
        arrays["density"] = np.asarray(prefilled.density)
    expected = _expected(model, cache.kind, len(lengths), slots)
    for name, array in arrays.items():
        if (array.shape, str(array.dtype)) != expected[name]:
            shape, dtype = expected[name]
            raise ValueError(
                f"the prefill's {name} is {array.dtype}{list(array.shape)}, this model gives {dtype}{list(shape)}"
            )
    metadata = {"format": _FORMAT, "version": str(_VERSION), "tokens": json.dumps(lengths), **_identity(model)}
    metadata["kv_cache"] = cache.kind
    metadata["checksums"] = json.dumps({name: _checksum(array) for name, array in arrays.items()})
    metadata["checksum"] = _checksum_of(metadata)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(arrays, partial, metadata=metadata)
        partial.replace(path)
    except SafetensorError as error:  # what the library makes of a full disk or a folder that is not there
        raise OSError(f"{path} can't be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_prefill(path: str | os.PathLike[str], model: LanguageModel) -> PrefillResult:
    """A prefill from a file of `save_prefill`, to answer from or to extend as if it had just been read.

    Args:
        path: of the file; nothing in it is executed.
        model: with the weights and the config that read it; the file's digest is compared with theirs.

    Returns:
        The prefill on jax's default device, its cache padded to a bucket; what was in host memory is there again.

    Raises:
        ValueError: the file is of another model, of a newer version, cut short, damaged, or something else.
        NotImplementedError: the cache was in host memory, and the device has no pinned one.
        MemoryError: the device has too little.
        OSError: it can't be read.
    """
    _check_is_file(Path(path), "read")
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            kind, lengths, checksums = _checked(metadata, model)
            arrays = {name: file.get_tensor(name) for name in sorted(names)}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short, damaged or no saved prefill: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    slots = max(lengths)
    if kind == "kept":  # of a long prompt there are fewer
        slots = min([slots, *arrays["k"].shape[2:3]]) if "k" in arrays else slots
    expected = _expected(model, kind, len(lengths), slots)
    if names - {"density"} != expected.keys() - {"density"} or names != checksums.keys():
        raise ValueError(f"{path} is damaged: it has the arrays {', '.join(sorted(names)) or 'none'}")
    for name, array in arrays.items():
        if (array.shape, str(array.dtype)) != expected[name] or _checksum(array) != checksums[name]:
            raise ValueError(f"{path} is damaged: its array {name} is not as it was saved")
    if metadata.get("checksum") != _checksum_of(metadata):
        raise ValueError(f"{path} is damaged: its metadata are not as they were saved")
    with memory_for(f"a saved prefill of {len(lengths)} x {max(lengths)} tokens"):
        logits = jnp.asarray(arrays.pop("logits"))
        density = jnp.asarray(arrays.pop("density")) if "density" in arrays else None
        room = bucket_length(slots) if slots == max(lengths) else slots
        return PrefillResult(logits, _cache(model, kind, arrays, lengths, room), density)


def _check_is_file(path: Path, how: str) -> None:
    """Refuses, with OSError, a folder, a device and the like."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} can't be {how}: it is no file")


def _arrays(cache: Any, slots: int) -> dict[str, np.ndarray]:
    """The arrays of a cache up to so many slots, by their names; they leave the device a layer at a time."""
    arrays = {}
    for name, held in cache._asdict().items():
        if name != "length":
            first = held[0]
            shape = (len(first), slots, *first.shape[2:]) if first.ndim > 1 else first.shape
            arrays[name] = np.empty((len(held), *shape), first.dtype)
            for layer, into in enumerate(arrays[name]):
                into[...] = np.asarray(held[layer])[: shape[0], : shape[1]] if first.ndim > 1 else held[layer]
    return arrays


def _cache(model: LanguageModel, kind: str, arrays: dict[str, np.ndarray], lengths: list[int], room: int) -> Any:
    """A cache of the arrays, which are used up, with room for so many slots."""
    length = jnp.asarray(lengths, jnp.int32)
    if kind == "host":
        check_host_memory(next(iter(length.devices())))

        def moved(array: np.ndarray) -> tuple[jax.Array, ...]:
            """A layer at a time."""
            layers = (jnp.asarray(_padded(layer[None], room)[0]) for layer in array)
            return tuple(jax.block_until_ready(to_host(layer)) for layer in layers)

        return HostKV(moved(arrays.pop("k")), moved(arrays.pop("v")), length)
    empty = jax.eval_shape(lambda: _empty(model, kind, len(lengths), room))
    return type(empty)(**{name: jnp.asarray(_padded(arrays.pop(name), room)) for name in list(arrays)}, length=length)


def _padded(array: np.ndarray, room: int) -> np.ndarray:
    """An array [L, B, S, ...] with room for so many slots; numpy's copy keeps every bit, that of XLA not."""
    if array.ndim < 3:
        return array
    padded = np.zeros((*array.shape[:2], room, *array.shape[3:]), array.dtype)
    padded[:, :, : array.shape[2]] = array
    return padded


def _empty(model: LanguageModel, kind: str, batch: int, slots: int) -> Any:
    config = model.config
    return _EMPTY[kind](config.num_layers, batch, slots, config.num_kv_heads, config.head_dim, model.model.dtype)


def _expected(model: LanguageModel, kind: str, batch: int, slots: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a model's prefill."""
    config, cache = model.config, jax.eval_shape(lambda: _empty(model, kind, batch, slots))
    shapes = {name: (array.shape, str(array.dtype)) for name, array in cache._asdict().items() if name != "length"}
    shapes["logits"] = (batch, config.vocab_size), "float32"
    shapes["density"] = (config.num_layers, batch, config.num_heads), "float32"
    return shapes


def _identity(model: LanguageModel) -> dict[str, str]:
    """What the keys and values of a prompt depend on, beside the prompt and the attention."""
    return {"config": repr(model.config), "weights": weights_digest(model.model)}


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _checksum_of(metadata: dict[str, str]) -> str:
    """Of all metadata but itself."""
    return str(zlib.crc32(json.dumps(sorted(item for item in metadata.items() if item[0] != "checksum")).encode()))


def _checked(metadata: dict[str, str], model: LanguageModel) -> tuple[str, list[int], dict[str, int]]:
    """Kind of cache, tokens of each row, checksum of each array; ValueError: no such file, or one of another model."""
    if metadata.get("format") != _FORMAT:
        raise ValueError("is a safetensors file, but no saved prefill")
    version = _read("version", metadata)
    if version != _VERSION:
        raise ValueError(f"is of version {version}, this release reads version {_VERSION}")
    kind = metadata.get("kv_cache", "plain")  # which files did not say before there were others
    if kind not in _EMPTY:
        raise ValueError(f"has a cache of the kind {kind!r}, this release reads {', '.join(_EMPTY)}")
    for name, own in _identity(model).items():
        if metadata.get(name) != own:
            raise ValueError(f"was saved from another model: its {name} and this model's are not the same")
    lengths, checksums = _read("tokens", metadata), _read("checksums", metadata)
    longest = model.config.max_length
    if not isinstance(lengths, list) or not all(type(count) is int and 1 <= count <= longest for count in lengths):
        raise ValueError(f"is damaged: its tokens must be numbers from 1 to {longest}")
    if not lengths or not isinstance(checksums, dict):
        raise ValueError("is damaged: its metadata tell no tokens or no checksums")
    return kind, lengths, checksums


def _read(name: str, metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata.get(name, ""))
    except json.JSONDecodeError:
        raise ValueError(f"is damaged: its metadata have no {name}") from None

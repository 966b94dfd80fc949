"""A prefill as a file, so that a long prefix is read once and questions about it are asked later, in other processes.

One safetensors file: `k` and `v` [L, B, S, K, H] up to the longest row, `logits` [B, V], and `density` [L, B, N] of a
sparse prefill. Its metadata tell format and version, the model, the tokens of each row, and a checksum of each array.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minference_jax.cache import KVCache
from minference_jax.generate.language_model import LanguageModel
from minference_jax.generate.programs import PrefillResult
from minference_jax.generate.prompts import bucket_length
from minference_jax.implementations import memory_for
from minference_jax.models.digest import weights_digest

_FORMAT, _VERSION = "minference_jax prefill", 1


def save_prefill(prefilled: PrefillResult, path: str | os.PathLike[str], model: LanguageModel) -> None:
    """Writes a prefill to a file that `load_prefill` reads; a save that is killed leaves what was there before.

    Keys and values of all rows up to the longest are kept bit for bit; host memory holds them meanwhile.

    Args:
        prefilled: from `LanguageModel.prefill` or `LanguageModel.extend`; it stays usable.
        path: of the file, in a folder that exists; a file there is replaced. `path` with ".partial" behind it is
            written first.
        model: that read it; its weights' digest goes into the file.

    Raises:
        ValueError: the prefill does not fit the model, or its cache is not the plain one.
        OSError: the file can't be written.
    """
    path, cache = Path(path), prefilled.cache
    if not isinstance(cache, KVCache):
        raise ValueError(
            f"only a prefill with kv_cache='plain' can be saved, this one's cache is a {type(cache).__name__}"
        )
    lengths = [int(length) for length in np.asarray(cache.length)]
    expected = _expected(model, lengths, cache.capacity)
    for name, array in _arrays(prefilled).items():
        if (array.shape, str(array.dtype)) != expected[name]:
            shape, dtype = expected[name]
            raise ValueError(
                f"the prefill's {name} is {array.dtype}{list(array.shape)}, this model gives {dtype}{list(shape)}"
            )
    written = prefilled._replace(cache=cache._replace(k=cache.k[:, :, : max(lengths)], v=cache.v[:, :, : max(lengths)]))
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(written).items()}
    metadata = {"format": _FORMAT, "version": str(_VERSION), "tokens": json.dumps(lengths), **_identity(model)}
    metadata["checksums"] = json.dumps({name: _checksum(array) for name, array in arrays.items()})
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
        The prefill on jax's default device, its cache padded to a bucket.

    Raises:
        ValueError: the file is of another model, of a newer version, cut short, damaged, or something else.
        MemoryError: the device has too little.
        OSError: it can't be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            lengths, checksums = _checked(metadata, model)
            arrays = {name: file.get_tensor(name) for name in sorted(names)}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short, damaged or no saved prefill: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    expected = _expected(model, lengths, max(lengths))
    if names - {"density"} != expected.keys() - {"density"} or names != checksums.keys():
        raise ValueError(f"{path} is damaged: it has the arrays {', '.join(sorted(names)) or 'none'}")
    for name, array in arrays.items():
        if (array.shape, str(array.dtype)) != expected[name] or _checksum(array) != checksums[name]:
            raise ValueError(f"{path} is damaged: its array {name} is not as it was saved")
    with memory_for(f"a saved prefill of {len(lengths)} x {max(lengths)} tokens"):
        k, v = (_padded(arrays.pop(name), bucket_length(max(lengths))) for name in ("k", "v"))
        cache = KVCache(k, v, jnp.asarray(lengths, jnp.int32))
        density = jnp.asarray(arrays["density"]) if "density" in arrays else None
        return PrefillResult(jnp.asarray(arrays["logits"]), cache, density)


def _padded(array: np.ndarray, capacity: int) -> jax.Array:
    """Keys or values [L, B, S, K, H] with room for `capacity` tokens; numpy's copy keeps every bit, that of XLA not."""
    room = np.zeros((*array.shape[:2], capacity, *array.shape[3:]), array.dtype)
    room[:, :, : array.shape[2]] = array
    return jnp.asarray(room)


def _arrays(prefilled: PrefillResult) -> dict[str, jax.Array]:
    """The arrays of a prefill by the names that they have in a file."""
    arrays = {"k": prefilled.cache.k, "v": prefilled.cache.v, "logits": prefilled.logits}
    return arrays if prefilled.density is None else {**arrays, "density": prefilled.density}


def _expected(model: LanguageModel, lengths: list[int], capacity: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a model's prefill."""
    config, batch = model.config, len(lengths)
    cache = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim), str(model.model.dtype)
    logits = (batch, config.vocab_size), "float32"
    return {
        "k": cache,
        "v": cache,
        "logits": logits,
        "density": ((config.num_layers, batch, config.num_heads), "float32"),
    }


def _identity(model: LanguageModel) -> dict[str, str]:
    """What the keys and values of a prompt depend on, beside the prompt and the attention."""
    return {"config": repr(model.config), "weights": weights_digest(model.model)}


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _checked(metadata: dict[str, str], model: LanguageModel) -> tuple[list[int], dict[str, int]]:
    """Tokens of each row and checksum of each array; ValueError: no such file, or one of another model."""
    if metadata.get("format") != _FORMAT:
        raise ValueError("is a safetensors file, but no saved prefill")
    version = _read("version", metadata)
    if version != _VERSION:
        raise ValueError(f"is of version {version}, this release reads version {_VERSION}")
    for name, own in _identity(model).items():
        if metadata.get(name) != own:
            raise ValueError(f"was saved from another model: its {name} and this model's are not the same")
    lengths, checksums = _read("tokens", metadata), _read("checksums", metadata)
    longest = model.config.max_length
    if not isinstance(lengths, list) or not all(type(count) is int and 1 <= count <= longest for count in lengths):
        raise ValueError(f"is damaged: its tokens must be numbers from 1 to {longest}")
    if not lengths or not isinstance(checksums, dict):
        raise ValueError("is damaged: its metadata tell no tokens or no checksums")
    return lengths, checksums


def _read(name: str, metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata.get(name, ""))
    except json.JSONDecodeError:
        raise ValueError(f"is damaged: its metadata have no {name}") from None

"""Back to a Hugging Face folder that transformers loads: config.json, safetensors in shards, tokenizer files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minference_jax.convert.aside import publish, written_aside
from minference_jax.convert.checkpoint import WEIGHTS_FOLDER, is_checkpoint, load_config, read_manifest, write_json
from minference_jax.convert.hf_folder import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE, read_json
from minference_jax.convert.hf_names import Parameter, hf_shape, hf_tensors
from minference_jax.convert.hf_tokenizer import TOKENIZER_FILES
from minference_jax.convert.placement import check_store
from minference_jax.convert.store import TensorStore
from minference_jax.convert.weight_source import DTYPES, PART_BYTES, Progress, cast, read_dtype, turned

SHARD_BYTES = 2**31  # most bytes of one safetensors file, unless one tensor has more


def export_model(
    checkpoint: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes a Hugging Face folder from a checkpoint of ours. Host memory: one shard, and 256 MiB or one tensor.

    The config is the one that the checkpoint was converted with (of a GGUF file or an original ChatGLM folder, that
    model in the terms of transformers). The folder is written under another name and renamed when it is complete.

    Args:
        checkpoint: folder written by `convert_model`.
        destination: the new folder.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's.
        shard_bytes: most bytes of weights in one file.
        progress: called as (bytes written, bytes in all, tensor) after every tensor.

    Returns:
        The destination.

    Raises:
        ValueError: not a checkpoint of ours, or a damaged one; the destination exists; a number that dtype can't hold.
        OSError: a file can't be read or written.
    """
    source, destination, chosen = Path(checkpoint), Path(destination).absolute(), read_dtype(dtype)
    if not is_checkpoint(source):
        raise ValueError(f"{source} is not a minference-jax checkpoint: convert the model first")
    if os.path.lexists(destination):
        raise ValueError(f"{destination} already exists; choose another")
    if shard_bytes < 1:
        raise ValueError(f"{shard_bytes=} must be at least 1")
    manifest, config = read_manifest(source), load_config(source)
    chosen = chosen or DTYPES[manifest["dtype"]]
    with closing(TensorStore(source / WEIGHTS_FOLDER, manifest["groups"])) as store:
        check_store(store, config, source)
        with written_aside(destination) as folder:
            fields = read_json(source / CONFIG_FILE)
            for name in ("torch_dtype", "auto_map"):  # the older name of dtype, and code that does not come along
                fields.pop(name, None)
            write_json(folder / CONFIG_FILE, fields | {"dtype": chosen.name})
            for name in (*TOKENIZER_FILES, GENERATION_FILE):
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            _write_shards(folder, hf_tensors(config), store, chosen, shard_bytes, progress)
            try:
                publish(folder, destination)
            except FileExistsError:
                raise ValueError(f"{destination} appeared during the export; it is left as it is") from None
    return destination


def hf_array(parameters: list[Parameter], read: Callable[[Parameter], np.ndarray]) -> np.ndarray:
    """A Hugging Face tensor, put together from the parameters that it holds.

    Args:
        parameters: from `hf_tensors`.
        read: gives one of them in our layout.
    """
    parts = [turned(read(parameter)) if parameter.is_kernel else read(parameter) for parameter in parameters]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _write_shards(
    folder: Path,
    tensors: dict[str, list[Parameter]],
    store: TensorStore,
    dtype: np.dtype,
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    sizes = {name: math.prod(hf_shape(parameters)) * dtype.itemsize for name, parameters in tensors.items()}
    shards = list(_portions(sizes, shard_bytes))
    places: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {}
        for name, array in _read_tensors(names, tensors, store, dtype):
            arrays[name] = array
            done += array.nbytes
            if progress is not None:
                progress(done, sum(sizes.values()), name)
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} can't be written: {error}") from error
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": done}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _read_tensors(
    names: list[str], tensors: dict[str, list[Parameter]], store: TensorStore, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of Hugging Face tensors; small ones are read many at once."""
    stored: dict[str, np.ndarray] = {}

    def read(parameter: Parameter) -> np.ndarray:
        return cast(stored.pop(parameter.key), dtype, parameter.key)

    keys = {name: [parameter.key for parameter in tensors[name]] for name in names}
    sizes = {name: sum(store.tensors[key].nbytes for key in keys[name]) for name in names}
    for together in _portions(sizes, PART_BYTES):
        stored |= store.read([key for name in together for key in keys[name]])
        for name in together:
            yield name, hf_array(tensors[name], read)


def _portions(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """The names in their order, in lists of at most `limit` bytes; one that has more makes a list of its own."""
    names: list[str] = []
    for name, size in sizes.items():
        if names and sum(map(sizes.__getitem__, names)) + size > limit:
            yield names
            names = []
        names.append(name)
    yield names

"""Our checkpoint folder, and loading of parameters from it or straight from any source.

weights/         Orbax, in groups of layers; one tensor for each layer of a parameter: layers.3.attention.q_proj.kernel
config.json      the model in the terms of Hugging Face
tokenizer.json, tokenizer_config.json, ...   what AutoTokenizer reads, and generation_config.json
patterns.json    optional: the sparse pattern of every head
minference-jax.json   written last: format, version, dtype, groups of weights, source, tokenizer files
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minference_jax.convert.aside import publish, written_aside
from minference_jax.convert.hf_config import read_config
from minference_jax.convert.hf_folder import CONFIG_FILE, GENERATION_FILE, read_json
from minference_jax.convert.hf_names import Parameter
from minference_jax.convert.hf_tokenizer import load_tokenizer_folder
from minference_jax.convert.hf_weights import match_weights, read_parameter, stored_dtype
from minference_jax.convert.placement import check_store, place, source_parts, stored_parts
from minference_jax.convert.sources import folder_tokenizer, locate, open_source, source_config
from minference_jax.convert.store import LazyTensor, TensorStore, save_tensors
from minference_jax.convert.weight_source import (
    ALREADY_WRITTEN,
    DTYPES,
    Progress,
    TensorInfo,
    WeightSource,
    cast,
    read_dtype,
)
from minference_jax.implementations import memory_for
from minference_jax.models import DecoderConfig, parameter_shardings
from minference_jax.models.fp8 import check_linear
from minference_jax.patterns.registry import resolve_patterns

FORMAT_NAME = "minference-jax/checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "minference-jax.json"
PATTERNS_FILE = "patterns.json"
WEIGHTS_FOLDER = "weights"
_GROUP = re.compile(r"\w+")
GROUP_BYTES = 2**28  # layers make up a group until it has so many; an interrupted conversion does one over again

Source = str | os.PathLike[str]


def convert_model(
    source: Source,
    destination: Source,
    *,
    dtype: str | None = None,
    patterns: Source | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint folder from a pretrained model.

    Host memory: the largest tensor, mostly the embedding, twice; once more in the new dtype where that is another. The
    folder is written under another name in the same parent and renamed when it is complete. A conversion that was
    killed or interrupted, or had no room left, goes on at the last group of layers that it finished when it is asked
    for again with the same source and dtype; with others, what it left is removed.

    Args:
        source: Hugging Face folder or hub id ("organisation/name"), GGUF file, or .whl or .zip with one.
        destination: the new folder.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's own (quantised GGUF tensors are float32,
            exactly; where a source mixes dtypes, float32, which holds all of them exactly).
        patterns: pattern file to store beside the weights, or a folder or release of published files, from which the
            model's is taken; None = none.
        overwrite: whether a checkpoint at destination is replaced, once the new one is complete.
        progress: called as (bytes read, bytes in all, tensor) after every tensor, in bytes of the checkpoint; tensor is
            ALREADY_WRITTEN for a group of them that was there.

    Returns:
        The destination.

    Raises:
        ValueError: the source is damaged or of a kind that can't be honoured, the pattern file does not fit the model,
            the destination exists (or is not a checkpoint, with overwrite). `WeightError` where the tensors do not
            match the config.
        OSError: a file can't be read or written.
    """
    destination, chosen = Path(destination).absolute(), read_dtype(dtype)
    check_destination(destination, overwrite)
    with closing(open_source(locate(source))) as opened:
        config = read_config(opened.config)
        parameters = match_weights(opened, config)
        chosen = chosen or stored_dtype(opened, parameters)
        stored_patterns = None if patterns is None else resolve_patterns(patterns, source, opened.config)
        if stored_patterns is not None:
            stored_patterns.patterns.check(config.num_layers, config.num_heads)
        with written_aside(destination, _identity(opened, chosen)) as folder:
            tokenizer_files = save_small_files(opened, folder)
            if stored_patterns is not None:
                (folder / PATTERNS_FILE).write_bytes(stored_patterns.raw)
            groups = _save_weights(folder / WEIGHTS_FOLDER, opened, parameters, chosen, progress)
            manifest = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "dtype": chosen.name, "groups": groups}
            manifest |= {"source": Path(opened.name).name, "tokenizer_files": tokenizer_files}
            write_json(folder / MANIFEST_FILE, manifest)
            try:
                publish(folder, destination, replaces=is_checkpoint if overwrite else None)
            except FileExistsError:
                raise ValueError(f"{destination} appeared during the conversion; it is left as it is") from None
    return destination


def load_parameters(
    source: Source,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    linear: str | None = None,
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """Config and parameters of a model, ready for `minference_jax.models.from_parameters`.

    Each byte is read once, but for a repeated lm_head of a model with tied embeddings, which is compared first. Host
    memory: four parts, of at most 256 MiB from safetensors, of the largest tensor from a checkpoint or GGUF file.

    Args:
        source: checkpoint folder, Hugging Face folder or hub id, GGUF file, or .whl or .zip with one.
        dtype: as in `convert_model`; None keeps the stored one.
        mesh: devices to split the parameters over, by `minference_jax.models.parameter_shardings` along its axis
            "model"; None = the default device.
        progress: called as (bytes loaded, bytes in all, parameter) after every part.
        linear: as in `load`: each weight is quantised as soon as it is there, and only one is held in `dtype`. Not
            with a mesh.

    Returns:
        The config, and name -> array, those of layers stacked [L, ...], kernels [in, out]; with `linear` what
        `minference_jax.models.quantize_parameters` makes of them.

    Raises:
        ValueError: as in `convert_model`; a checkpoint that is incomplete or damaged; a mesh that does not fit; an
            unknown `linear`.
        MemoryError: the devices have too little.
    """
    check_linear(linear)
    if linear is not None and mesh is not None:
        raise ValueError(f"{linear=} does not go with a mesh")
    with memory_for(f"the model {source}"):
        return _load_parameters(source, dtype, mesh, progress, linear)


def _load_parameters(
    source: Source, dtype: str | None, mesh: Mesh | None, progress: Progress | None, linear: str | None
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    path, chosen = locate(source), read_dtype(dtype)
    if is_checkpoint(path):
        manifest, config = read_manifest(path), load_config(path)
        shardings = None if mesh is None else parameter_shardings(config, mesh)
        with closing(TensorStore(path / WEIGHTS_FOLDER, manifest["groups"])) as store:
            check_store(store, config, path)
            chosen = chosen or DTYPES[manifest["dtype"]]
            return config, place(config, chosen, stored_parts(store, config), progress, shardings, linear)
    with closing(open_source(path)) as opened:
        config = read_config(opened.config)
        shardings = None if mesh is None else parameter_shardings(config, mesh)
        parameters = match_weights(opened, config)
        chosen = chosen or stored_dtype(opened, parameters)
        return config, place(config, chosen, source_parts(opened, parameters), progress, shardings, linear)


def load_config(source: Source) -> DecoderConfig:
    """The config of a model, from any source that `load_parameters` takes; no weights are read or downloaded.

    Raises:
        ValueError: it is missing, or has something that our models can't honour.
    """
    return read_config(source_config(locate(source, weights=False)))


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model (transformers, without torch), from any source that `load_parameters` takes.

    Raises:
        ValueError: there is none, or it can't be loaded.
    """
    path = locate(source, weights=False)
    if path.is_dir():
        return folder_tokenizer(path)
    with closing(open_source(path)) as opened:
        return opened.load_tokenizer()


def load_stop_tokens(source: Source) -> tuple[int, ...]:
    """The ids after which the model has nothing more to say: eos_token_id of its generation config, else of its config.

    Raises:
        ValueError: neither names one.
    """
    path = locate(source, weights=False)
    if path.is_dir():
        candidates = [path / name for name in (GENERATION_FILE, CONFIG_FILE) if (path / name).is_file()]
        configs = [read_json(candidate) for candidate in candidates]
    else:
        configs = [source_config(path)]
    for config in configs:
        stops = config.get("eos_token_id")
        if stops is not None:
            return tuple(stops) if isinstance(stops, list) else (stops,)
    raise ValueError(f"{source} names no eos_token_id")


def checkpoint_patterns(source: Source) -> Path | None:
    """The pattern file stored in a checkpoint; None where there is none or the source is not a checkpoint."""
    path = Path(source) / PATTERNS_FILE
    return path if is_checkpoint(Path(source)) and path.is_file() else None


def is_checkpoint(path: Source) -> bool:
    """Whether a folder is a complete checkpoint of ours."""
    return (Path(path) / MANIFEST_FILE).is_file()


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises ValueError where a checkpoint can't be written."""
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise ValueError(f"{destination} already exists; choose another or ask to overwrite it (--overwrite)")
    if not is_checkpoint(destination):
        raise ValueError(f"{destination} is not a minference-jax checkpoint, so it is not overwritten")


def save_small_files(source: WeightSource, folder: Path) -> list[str]:
    """Writes config and tokenizer; returns the names of the tokenizer's files, none if there is no tokenizer.

    Raises:
        ValueError: the tokenizer can't be loaded; a checkpoint without it is not worth its weights.
    """
    names = source.save_tokenizer(folder)
    write_json(folder / CONFIG_FILE, source.config)
    if names:
        try:
            load_tokenizer_folder(folder)
        except ValueError as error:  # which names the new folder, soon gone
            raise ValueError(f"the tokenizer of {source.name} can't be loaded: {error.__cause__}") from error
    return names


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: dtype, groups of weights, source, tokenizer_files.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT_NAME, FORMAT_VERSION):
        raise ValueError(
            f"{folder / MANIFEST_FILE} says format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this release reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
        )
    if manifest.get("dtype") not in DTYPES:
        raise ValueError(f"{folder / MANIFEST_FILE} says dtype {manifest.get('dtype')!r}; known: {', '.join(DTYPES)}")
    groups = manifest.setdefault("groups", [])
    if not isinstance(groups, list) or not all(isinstance(name, str) and _GROUP.fullmatch(name) for name in groups):
        raise ValueError(f"{folder / MANIFEST_FILE} says groups {groups!r}, which are not names of folders of weights")
    return manifest


def _identity(source: WeightSource, dtype: np.dtype) -> str:
    """What an unfinished checkpoint is made from, so that only the same conversion takes it up again."""
    stats = [(str(path.absolute()), path.stat()) for path in source.files]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    release = [version("minference-jax"), FORMAT_VERSION]  # another one may divide the weights in other groups
    kept = {"release": release, "group_bytes": GROUP_BYTES, "dtype": dtype.name}
    return json.dumps(kept | {"files": files, "config": source.config}, sort_keys=True)


def _save_weights(
    folder: Path, source: WeightSource, parameters: list[Parameter], dtype: np.dtype, progress: Progress | None
) -> list[str]:
    """Writes the groups that are not there yet; returns the names of all."""
    total = _nbytes(parameters, dtype)
    done = 0

    def reader(parameter: Parameter) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            nonlocal done
            array = cast(read_parameter(source, parameter), dtype, parameter.tensor)
            done += array.nbytes
            if progress is not None:
                progress(done, total, parameter.key)
            return array

        return read

    folder.mkdir(exist_ok=True)
    groups = dict(_groups(parameters, dtype))
    for name, group in groups.items():
        if _holds(folder / name, group, dtype):
            done += _nbytes(group, dtype)
            if progress is not None:
                progress(done, total, ALREADY_WRITTEN)
            continue
        for unfinished in folder.glob(f"{name}*"):  # Orbax writes under a longer name and renames it at the end
            shutil.rmtree(unfinished)
        tensors = {
            parameter.key: LazyTensor(shape=parameter.shape, dtype=dtype, read=reader(parameter)) for parameter in group
        }
        save_tensors(folder / name, tensors)
    return list(groups)


def _nbytes(parameters: list[Parameter], dtype: np.dtype) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters) * dtype.itemsize


def _holds(folder: Path, group: list[Parameter], dtype: np.dtype) -> bool:
    """Whether a folder is a group that was written whole."""
    if not folder.is_dir():
        return False
    try:
        with closing(TensorStore(folder)) as store:
            return store.tensors == {parameter.key: TensorInfo(parameter.shape, dtype) for parameter in group}
    except ValueError:
        return False


def _groups(parameters: list[Parameter], dtype: np.dtype) -> Iterator[tuple[str, list[Parameter]]]:
    """Names and members of the groups: first what lies outside the layers, then layers until they make up enough."""
    yield "outside_layers", [parameter for parameter in parameters if parameter.layer is None]
    layers = sorted({parameter.layer for parameter in parameters if parameter.layer is not None})
    group: list[Parameter] = []
    for layer in layers:
        group += [parameter for parameter in parameters if parameter.layer == layer]
        if _nbytes(group, dtype) >= GROUP_BYTES or layer == layers[-1]:
            yield f"layers_{group[0].layer:04}_to_{layer:04}", group
            group = []

"""Our checkpoint folder, and loading of parameters from it or straight from any source.

weights/         Orbax; one tensor for each layer of a parameter: layers.3.attention.q_proj.kernel
config.json      the model in the terms of Hugging Face
tokenizer.json, tokenizer_config.json, ...   what AutoTokenizer reads, and generation_config.json
patterns.json    optional: the sparse pattern of every head
minference-jax.json   written last: format, version, dtype, files
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minference_jax.convert.aside import publish, written_aside
from minference_jax.convert.hf_config import read_config
from minference_jax.convert.hf_folder import CONFIG_FILE, GENERATION_FILE, read_json
from minference_jax.convert.hf_tokenizer import load_tokenizer_folder
from minference_jax.convert.hf_weights import Parameter, match_weights, stored_tensors
from minference_jax.convert.sources import locate, open_source
from minference_jax.convert.stacking import check_store, source_layers, stack, stored_layers
from minference_jax.convert.store import LazyTensor, TensorStore, save_tensors
from minference_jax.convert.weight_source import DTYPES, Progress, WeightSource, cast, common_dtype, read_dtype
from minference_jax.models.llama import LlamaConfig
from minference_jax.patterns import read_patterns

FORMAT_NAME = "minference-jax/checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "minference-jax.json"
PATTERNS_FILE = "patterns.json"
WEIGHTS_FOLDER = "weights"

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
    """Writes a checkpoint folder from a pretrained model, holding one tensor in memory at a time.

    The folder is written under another name in the same parent and renamed when it is complete.

    Args:
        source: Hugging Face folder or hub id ("organisation/name"), GGUF file, or .whl or .zip with one.
        destination: the new folder.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's own (quantised GGUF tensors are float32,
            exactly; where a source mixes dtypes, float32, which holds all of them exactly).
        patterns: pattern file to store beside the weights; None = none.
        overwrite: whether a checkpoint at destination is replaced, once the new one is complete.
        progress: called as (bytes written, bytes in all, tensor) after every tensor.

    Returns:
        The destination.

    Raises:
        ValueError: the source is damaged or of a kind that can't be honoured, the pattern file does not fit the model,
            the destination exists (or is not a checkpoint, with overwrite). `WeightError` where the tensors do not
            match the config.
    """
    destination, chosen = Path(destination).absolute(), read_dtype(dtype)
    _check_destination(destination, overwrite)
    with closing(open_source(locate(source))) as opened:
        config = read_config(opened.config)
        parameters = match_weights(opened, config)
        chosen = chosen or common_dtype(stored_tensors(parameters, opened))
        if patterns is not None:
            read_patterns(patterns).check(config.num_layers, config.num_heads)
        with written_aside(destination) as folder:
            tokenizer_files = opened.save_tokenizer(folder)
            _write_json(folder / CONFIG_FILE, opened.config)
            if tokenizer_files:
                load_tokenizer_folder(folder)  # a checkpoint whose tokenizer does not load is not worth its weights
            if patterns is not None:
                shutil.copyfile(patterns, folder / PATTERNS_FILE)
            save_tensors(folder / WEIGHTS_FOLDER, _lazy_tensors(opened, parameters, chosen, progress))
            manifest = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "dtype": chosen.name}
            manifest |= {"source": Path(opened.name).name, "tokenizer_files": tokenizer_files}
            _write_json(folder / MANIFEST_FILE, manifest)
            try:
                publish(folder, destination, overwrite=overwrite)
            except FileExistsError:
                raise ValueError(f"{destination} appeared during the conversion; it is left as it is") from None
    return destination


def load_parameters(
    source: Source, *, dtype: str | None = None, progress: Progress | None = None
) -> tuple[LlamaConfig, dict[str, jax.Array]]:
    """Config and parameters of a model, ready for `from_parameters`. Host memory: the model and one stacked tensor.

    Args:
        source: checkpoint folder, Hugging Face folder or hub id, GGUF file, or .whl or .zip with one.
        dtype: as in `convert_model`; None keeps the stored one.
        progress: called as (bytes loaded, bytes in all, parameter) after every parameter.

    Returns:
        The config, and name -> array on the default device, those of layers stacked [L, ...], kernels [in, out].

    Raises:
        ValueError: as in `convert_model`; a checkpoint that is incomplete or damaged.
    """
    path, chosen = locate(source), read_dtype(dtype)
    if is_checkpoint(path):
        stored_dtype = DTYPES[_read_manifest(path)["dtype"]]
        config = load_config(path)
        with closing(TensorStore(path / WEIGHTS_FOLDER)) as store:
            check_store(store, config, path)
            return config, stack(config, chosen or stored_dtype, stored_layers(store, config), progress)
    with closing(open_source(path)) as opened:
        config = read_config(opened.config)
        parameters = match_weights(opened, config)
        chosen = chosen or common_dtype(stored_tensors(parameters, opened))
        return config, stack(config, chosen, source_layers(opened, parameters), progress)


def load_config(source: Source) -> LlamaConfig:
    """The config of a model, from any source that `load_parameters` takes; no weights are read or downloaded.

    Raises:
        ValueError: it is missing, or has something that our models can't honour.
    """
    path = locate(source, weights=False)
    if path.is_dir():
        return read_config(read_json(path / CONFIG_FILE))
    with closing(open_source(path)) as opened:
        return read_config(opened.config)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model (transformers, without torch), from any source that `load_parameters` takes.

    Raises:
        ValueError: there is none, or it can't be loaded.
    """
    path = locate(source, weights=False)
    if path.is_dir():
        return load_tokenizer_folder(path)
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
        with closing(open_source(path)) as opened:
            configs = [opened.config]
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


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise ValueError(f"{destination} already exists; choose another or ask to overwrite it")
    if not is_checkpoint(destination):
        raise ValueError(f"{destination} is not a minference-jax checkpoint, so it is not overwritten")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST_FILE)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT_NAME, FORMAT_VERSION):
        raise ValueError(
            f"{folder / MANIFEST_FILE} says format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this release reads {FORMAT_NAME!r} version {FORMAT_VERSION}"
        )
    if manifest.get("dtype") not in DTYPES:
        raise ValueError(f"{folder / MANIFEST_FILE} says dtype {manifest.get('dtype')!r}; known: {', '.join(DTYPES)}")
    return manifest


def _lazy_tensors(
    source: WeightSource, parameters: list[Parameter], dtype: np.dtype, progress: Progress | None
) -> dict[str, LazyTensor]:
    total = sum(math.prod(parameter.shape) for parameter in parameters) * dtype.itemsize
    done = 0

    def reader(parameter: Parameter) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            nonlocal done
            array = cast(parameter.read(source), dtype, parameter.tensor)
            done += array.nbytes
            if progress is not None:
                progress(done, total, parameter.tensor)
            return array

        return read

    return {
        parameter.key: LazyTensor(shape=parameter.shape, dtype=dtype, read=reader(parameter))
        for parameter in parameters
    }

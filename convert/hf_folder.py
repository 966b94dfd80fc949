"""A Hugging Face model folder: config.json, safetensors (one file or sharded) and tokenizer files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from minference_jax.convert.hf_tokenizer import TOKENIZER_FILES, has_tokenizer, load_tokenizer_folder
from minference_jax.convert.weight_source import DTYPES, TensorInfo

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class _Stored(NamedTuple):
    """Where a tensor lies: bytes [start, start + size) of a file."""

    path: Path
    start: int
    info: TensorInfo


class HuggingFaceFolder:
    """A folder as a `WeightSource`. Opening reads config, index and headers only.

    Args:
        path: the folder.

    Raises:
        ValueError: it has no config or no safetensors, holds pickles only, its index leaves the folder or disagrees
            with the shards, a file is damaged or cut short, a tensor has a dtype other than F32, F16 and BF16.
    """

    reads_rows = True

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.config: dict[str, Any] = read_json(path / CONFIG_FILE)
        self._stored = _open_weights(path)
        self.files = tuple(sorted({stored.path for stored in self._stored.values()}))
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `WeightSource.read`. Read, not mapped, so that memory holds these rows and nothing else of the file."""
        path, offset, info = self._stored[name]
        shape = info.shape if (start, stop) == (0, None) else (len(range(info.shape[0])[start:stop]), *info.shape[1:])
        row = math.prod(info.shape[1:]) * info.dtype.itemsize
        count = math.prod(shape) * info.dtype.itemsize
        data = np.fromfile(path, np.uint8, count, offset=offset + start * row)
        if len(data) != count:
            raise ValueError(f"{path} is cut short: {name} needs {count} bytes, {len(data)} are there")
        return data.view(info.dtype).reshape(shape)

    def load_tokenizer(self) -> Any:
        """See `WeightSource.load_tokenizer`."""
        return load_tokenizer_folder(self.path)

    def save_tokenizer(self, folder: Path) -> list[str]:
        """See `WeightSource.save_tokenizer`; known files only are copied, byte for byte, never code."""
        kinds = TOKENIZER_FILES if has_tokenizer(self.path) else ()
        names = [name for name in (*kinds, GENERATION_FILE) if (self.path / name).is_file()]
        for name in names:
            shutil.copyfile(self.path / name, folder / name)
        return names if kinds else []

    def close(self) -> None:
        """See `WeightSource.close`; no file stays open between calls."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is absent or holds anything else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # also digits beyond what Python reads
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _open_weights(folder: Path) -> dict[str, _Stored]:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}; remove the one that is not meant")
    if single.is_file():
        return _read_header(single)
    if index.is_file():
        return _open_shards(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights only ({', '.join(pickles)}), which can run code when loaded; "
            f"save the model as safetensors first"
        )
    raise ValueError(
        f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}, so it is no Hugging Face folder (a checkpoint "
        f"of minference-jax needs no conversion)"
    )


def _open_shards(folder: Path, index: Path) -> dict[str, _Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    stored: dict[str, _Stored] = {}
    faults = []
    for shard in sorted(set(places.values())):
        if _leaves_folder(shard):
            raise ValueError(f"{index} names {shard!r}, which is outside its folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{index} names the shard {shard}, which is missing")
        header = _read_header(folder / shard)
        listed = {name for name, place in places.items() if place == shard}
        faults += [f"{name} is not in {shard}, where the index has it" for name in sorted(listed - header.keys())]
        faults += [f"{name} is in {shard}, not so in the index" for name in sorted(header.keys() - listed)]
        stored |= header
    if faults:
        raise ValueError(f"{index} and its shards disagree: " + "; ".join(faults))
    return stored


def _leaves_folder(name: str) -> bool:
    return any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _two(offsets: Any) -> tuple[int, int]:
    """Two whole numbers; raises ValueError or TypeError where they are not."""
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise TypeError("offsets must be whole numbers")
    return begin, end


def _read_header(path: Path) -> dict[str, _Stored]:
    """Where the tensors of a safetensors file lie: 8 bytes of header length, a JSON header, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is cut short or not a safetensors file: {size} bytes, header of {length}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {
            name: (str(entry["dtype"]), tuple(entry["shape"]), *_two(entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: {type(error).__name__} in its header") from None
    others = sorted({dtype for dtype, *_ in entries.values() if dtype not in _DTYPES})
    if others:
        raise ValueError(f"{path} holds tensors of dtype {', '.join(others)}; supported: {', '.join(_DTYPES)}")
    stored = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if not all(isinstance(side, int) and side >= 0 for side in shape) or begin < 0:
            raise ValueError(f"{path} is damaged: {name} has shape {list(shape)} at byte {begin}")
        info = TensorInfo(shape, _DTYPES[dtype])
        if end - begin != info.nbytes:
            raise ValueError(f"{path} is damaged: {name} has {end - begin} bytes for {dtype} {list(shape)}")
        if 8 + length + end > size:
            raise ValueError(f"{path} is cut short: {name} ends at byte {8 + length + end}, the file at {size}")
        stored[name] = _Stored(path, 8 + length + begin, info)
    return stored

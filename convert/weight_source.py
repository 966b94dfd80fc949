"""What every format of pretrained weights looks like from inside: a config, tensors by name, a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

ALREADY_WRITTEN = "written before"  # what progress calls a group of tensors that an interrupted conversion has left
PART_BYTES = 2**28  # most bytes of a tensor that are read at once, where the source can read rows
_STRIP = 16  # rows of a matrix that are turned round together

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name of the tensor just done

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class TensorInfo(NamedTuple):
    """Shape and dtype (one of `DTYPES`) of a stored tensor, as `WeightSource.read` returns it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """An opened file or folder of pretrained weights. Tensors are read one by one, when asked for.

    Attributes:
        name: what was opened, for messages.
        files: what the weights are read from.
        reads_rows: whether reading some rows of a tensor takes no more than these.
        config: the model in the terms of a Hugging Face config.json.
        tensors: name (Hugging Face's) -> shape and dtype of every tensor there.
    """

    name: str
    files: tuple[Path, ...]
    reads_rows: bool
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor in Hugging Face's layout (kernels [out, in]), or some of its rows; nothing of it is kept.

        Args:
            name: of the tensor.
            start, stop: which part of its first axis; None = to its end.

        Raises:
            ValueError: the file does not hold what its header promises.
        """

    def load_tokenizer(self) -> Any:
        """The tokenizer as transformers' AutoTokenizer gives it.

        Raises:
            ValueError: there is none, or it can't be loaded.
        """

    def save_tokenizer(self, folder: Path) -> list[str]:
        """Writes what AutoTokenizer needs into a folder, and generation_config.json where there is one.

        Returns the files' names, none if there is no tokenizer.
        """

    def close(self) -> None:
        """Closes files; the source can't be read any more."""


def read_dtype(dtype: str | None) -> np.dtype | None:
    """The numpy dtype of a name; None stays None (keep what is stored).

    Raises:
        ValueError: not one of the supported names.
    """
    if dtype is None:
        return None
    try:
        return DTYPES[np.dtype(dtype).name]
    except (KeyError, TypeError):
        raise ValueError(f"dtype={dtype!r} must be None or one of {', '.join(DTYPES)}") from None


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in another dtype, rounded to nearest; the array itself where it already has it.

    Raises:
        ValueError: a finite number lies outside the new dtype's range.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    lost = ~np.isfinite(out)
    if lost.any() and (lost := lost & np.isfinite(array)).any():
        raise too_large(name, float(np.abs(array[lost].astype(np.float32)).max()), dtype)
    return out


def too_large(name: str, largest: float, dtype: np.dtype) -> ValueError:
    """What to raise where a number lies outside a dtype's range."""
    return ValueError(f"{name} holds {largest:g}, which {dtype.name} can't; use float32 or bfloat16")


def turned(array: np.ndarray) -> np.ndarray:
    """A matrix turned round, as a new array: in strips of few rows, which is several times faster than all at once."""
    out = np.empty(array.shape[::-1], array.dtype)
    for row in range(0, len(array), _STRIP):
        out[:, row : row + _STRIP] = array[row : row + _STRIP].T
    return out

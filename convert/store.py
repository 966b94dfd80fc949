"""Tensors in an Orbax checkpoint, written and read one by one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from minference_jax.convert.weight_source import TensorInfo

_CHUNK_BYTES = 2**26  # of one file chunk: what is compressed, written and read at once


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor that is made when Orbax is about to write it.

    Attributes:
        shape, dtype: what `read` returns.
        read: makes the array; called once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes lazy tensors as numpy arrays, each one finished before the next is made.

    Orbax's own handlers get all values of a tree at once, and its partial saves take time quadratic in the number of
    leaves (82 s for 272 of them, against 4 s).
    """

    async def serialize(
        self,
        values: Sequence[LazyTensor],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        """Reads, writes and forgets one tensor after the other."""
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            await self._serialize_one(np.ascontiguousarray(value.read()), info, arg)
        return []

    async def _serialize_one(self, array: np.ndarray, info: ocp.type_handlers.ParamInfo, arg: ocp.SaveArgs) -> None:
        for written in await super().serialize([array], [info], [arg]):
            written.result()


def save_tensors(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes an Orbax checkpoint of a flat tree, holding one tensor in memory at a time.

    Args:
        folder: must not exist.
        tensors: key -> tensor, written in this order.

    Raises:
        OSError: the folder can't be written, as where the disk is full. And what a tensor's `read` raises.
    """
    faults: list[Exception] = []

    def watched(tensor: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            try:
                return tensor.read()
            except Exception as error:
                faults.append(error)
                raise

        return replace(tensor, read=read)

    try:
        with _silent_log():
            _save(folder, {key: watched(tensor) for key, tensor in tensors.items()})
    except Exception as error:  # Orbax and TensorStore raise types of every kind
        if faults:
            raise faults[0] from None
        raise OSError(f"the weights in {folder} can't be written: {str(error).splitlines()[0]}") from error
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a folder that is there is whole, also after a loss of power


@contextmanager
def _silent_log() -> Iterator[None]:
    """Keeps Orbax from logging an error, page by page, that is raised as well."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _save(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyTensor, _LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # not used; without it Orbax warns
    )
    save_args = {key: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for key in tensors}
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tensors, save_args=save_args))


class TensorStore:
    """Orbax checkpoints of flat trees, opened for reading as one.

    Args:
        folder: written by `save_tensors`, or one that holds such folders.
        groups: names of these folders; () = the folder itself is one.

    Attributes:
        tensors: key -> shape and dtype.

    Raises:
        ValueError: one is not a whole Orbax checkpoint.
    """

    def __init__(self, folder: Path, groups: Sequence[str] = ()):
        self.folder = folder.absolute()
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._folders: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for group in [self.folder / name for name in groups] or [self.folder]:
                found = self._checkpointer.metadata(group).item_metadata
                if found is None:
                    raise FileNotFoundError(f"{group.name} is no whole Orbax checkpoint")
                tree = found.tree
                self._folders |= dict.fromkeys(tree, group)
                self.tensors |= {
                    key: TensorInfo(tuple(entry.shape), np.dtype(entry.dtype)) for key, entry in tree.items()
                }
        except Exception as error:  # Orbax and TensorStore raise types of every kind
            self.close()
            raise ValueError(f"the weights in {folder} are damaged: {error}") from error

    def read(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The tensors of these keys as numpy arrays, in this order. A call takes some 10 ms, however few they are.

        Raises:
            ValueError: a part of them is missing or damaged.
        """
        tensors: dict[str, np.ndarray] = {}
        for folder, group in groupby(sorted(keys, key=self._folders.__getitem__), key=self._folders.__getitem__):
            restore_args = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in group}
            args = ocp.args.PyTreeRestore(
                dict.fromkeys(restore_args, 0), restore_args=restore_args, partial_restore=True
            )
            try:
                tensors |= self._checkpointer.restore(folder, args=args)
            except Exception as error:
                raise ValueError(f"the weights in {self.folder} are damaged: {error}") from error
        return {key: tensors[key] for key in keys}

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._checkpointer.close()

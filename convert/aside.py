"""Folders that appear whole or not at all: written beside their destination, renamed at the end."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays until it is deleted by hand
    fcntl = None  # type: ignore[assignment]


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination` to write into; removed at the end unless `publish` has renamed it.

    What a killed process left there earlier is removed first. A process holds a lock on its folder, which the system
    drops when it dies, so the folder of a live one is never touched.

    Args:
        destination: where the folder is to go; its parent is made if need be.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(destination)
    while True:
        folder = _beside(destination, "partial")
        folder.mkdir()
        with _locked(folder):
            if not folder.exists():  # another process took it for a left-over before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def publish(folder: Path, destination: Path, *, overwrite: bool) -> None:
    """Renames a finished folder to its destination.

    Args:
        folder: from `written_aside(destination)`.
        overwrite: whether what is there is replaced; it is renamed away first and deleted last.

    Raises:
        FileExistsError: the destination is there and overwrite is false.
    """
    if not os.path.lexists(destination):
        try:
            folder.rename(destination)
            return
        except OSError:
            if not os.path.lexists(destination):
                raise  # else it has appeared just now, from another process
    if not overwrite:
        raise FileExistsError(f"{destination} already exists")
    old = _beside(destination, "replaced")
    with _locked(destination):
        destination.rename(old)
        folder.rename(destination)
        shutil.rmtree(old, ignore_errors=True)


def _beside(destination: Path, kind: str) -> Path:
    """A fresh hidden name next to the destination."""
    return destination.with_name(f".{destination.name}.{kind}-{secrets.token_hex(4)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock by which `_remove_leftovers` tells a live process's folder."""
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: nobody removes what they can't lock
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_leftovers(destination: Path) -> None:
    """Removes unfinished folders of dead processes, and replaced ones where the new one has arrived."""
    if fcntl is None:
        return
    kinds = ["partial", "replaced"] if destination.exists() else ["partial"]
    prefixes = tuple(f".{destination.name}.{kind}-" for kind in kinds)
    for folder in destination.parent.iterdir():
        if not folder.name.startswith(prefixes):
            continue
        with suppress(OSError):  # locked by a live process, or removed by another one at this moment
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)

"""Folders that appear whole or not at all: written beside their destination, renamed at the end.

Work that was interrupted can go on: an unfinished folder that was made from the same things is taken up again.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays until it is deleted by hand
    fcntl = None  # type: ignore[assignment]


_IDENTITY = ".made-from"  # the file in an unfinished folder that says what it is made from


@contextmanager
def written_aside(destination: Path, identity: str | None = None) -> Iterator[Path]:
    """A folder beside `destination` to write into; removed at the end unless `publish` has renamed it.

    What killed processes left there earlier is removed first. A process holds a lock on its folder, which the system
    drops when it dies, so the folder of a live one is never touched.

    Args:
        destination: where the folder is to go; its parent is made if need be.
        identity: says what the folder is made from. Then a process that is killed or interrupted, or has no room left,
            leaves its folder, and the next one takes it up again, with the folders in it but not the files, where it
            was made from the same. None = it is always a new one.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        folder = _take_up(destination, identity, locks) or _make(destination, identity, locks)
        try:
            yield folder
        except BaseException as error:
            if identity is None or isinstance(error, ValueError):  # a refusal, which would come again
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, destination: Path, *, replaces: Callable[[Path], bool] | None = None) -> None:
    """Renames a finished folder to its destination.

    Args:
        folder: from `written_aside(destination)`.
        replaces: whether what is at the destination may be replaced; it is renamed away first and deleted last. None =
            nothing may.

    Raises:
        FileExistsError: something is there that may not be replaced.
    """
    _rename(folder, destination, replaces)
    (destination / _IDENTITY).unlink(missing_ok=True)


def _rename(folder: Path, destination: Path, replaces: Callable[[Path], bool] | None) -> None:
    if not os.path.lexists(destination):
        try:
            folder.rename(destination)
            return
        except OSError:
            if not os.path.lexists(destination):
                raise  # else it has appeared just now, from another process
    if replaces is None or not replaces(destination):
        raise FileExistsError(f"{destination} already exists")
    old = _beside(destination, "replaced")
    with _locked(destination):
        destination.rename(old)
        folder.rename(destination)
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)


def _beside(destination: Path, kind: str) -> Path:
    """A fresh hidden name next to the destination."""
    return destination.with_name(f".{destination.name}.{kind}-{secrets.token_hex(4)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock by which `_take_up` tells a live process's folder."""
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


def _make(destination: Path, identity: str | None, locks: ExitStack) -> Path:
    """A new unfinished folder, locked."""
    while True:
        folder = _beside(destination, "partial")
        try:
            folder.mkdir()
        except OSError as error:  # names the destination, which the caller knows
            raise type(error)(error.errno, error.strerror, str(destination)) from None
        locks.enter_context(_locked(folder))
        if folder.exists():  # else another process took it for a left-over before it was locked
            if identity is not None:
                (folder / _IDENTITY).write_text(identity, "utf-8")
            return folder


def _take_up(destination: Path, identity: str | None, locks: ExitStack) -> Path | None:
    """An unfinished folder of a dead process that was made from the same, locked; others are removed.

    So are replaced folders where the new one has arrived.
    """
    if fcntl is None:
        return None
    taken: Path | None = None
    kinds = ["partial", "replaced"] if destination.exists() else ["partial"]
    prefixes = tuple(f".{destination.name}.{kind}-" for kind in kinds)
    for folder in destination.parent.iterdir():
        if not folder.name.startswith(prefixes):
            continue
        with suppress(OSError):  # locked by a live process, or removed by another one at this moment
            lock = os.open(folder, os.O_RDONLY)
            with ExitStack() as this:
                this.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if taken is None and identity is not None and _identity_of(folder) == identity:
                    _remove_files(folder)
                    taken = folder
                    locks.push(this.pop_all())
                else:
                    shutil.rmtree(folder)
    return taken


def _remove_files(folder: Path) -> None:
    """Removes the files of an unfinished folder, which are soon written again and may now be others."""
    for path in folder.iterdir():
        if path.name != _IDENTITY and not path.is_dir():
            path.unlink()


def _identity_of(folder: Path) -> str | None:
    try:
        return (folder / _IDENTITY).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None

"""Whether what a command is to write can be written, asked before the work whose results it holds."""

from __future__ import annotations

import os
from pathlib import Path


def check_output(path: str | os.PathLike[str], *, replaces: bool = False) -> None:
    """Whether a file can be written there; no folder is made for it.

    Args:
        path: of the file.
        replaces: whether a new file takes the place of one that is there, which its folder must allow.

    Raises:
        ValueError: it is a folder or no name, its folder does not exist, or nothing can be written there.
    """
    file = Path(path)
    if not str(path):
        raise ValueError("'' is no name of a file: name one")
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name a file")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent} is no folder, so {file.name} can't be written there")
    if file.exists() and not os.access(file, os.W_OK):
        raise ValueError(f"{file} can't be written: name another file")
    if (replaces or not file.exists()) and not os.access(file.parent, os.W_OK):
        raise ValueError(f"nothing can be written in {file.parent}: name a file elsewhere")


def records_file(path: str | None) -> Path | None:
    """The file to which a bench appends, its folder made where there is none; None = none is asked for.

    Raises:
        ValueError: as `check_output`.
        OSError: the folder can't be made.
    """
    if path is None:
        return None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    return Path(path)

"""Reads one named pattern file out of a MInference release: a folder, or an archive that is never unpacked to disk."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from minference_jax.patterns.files import MAX_BYTES, read_raw

_TARS, _ZIPS = (".tar.gz", ".tgz"), (".zip", ".whl")
_CONFIGS = ("minference", "configs")  # where a release keeps the files
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error),
    *(EOFError, LookupError, OSError, OverflowError, RuntimeError, ValueError),
)  # what the standard library raises for archives that are damaged or encrypted


class FoundFile(NamedTuple):
    """The bytes of a pattern file (at most MAX_BYTES + 1), and its path, which for one in an archive begins with it."""

    raw: bytes
    place: str


def is_release(source: str | os.PathLike[str]) -> bool:
    """Whether source (str or path) is a folder or named as an archive (.tar.gz, .tgz, .zip, .whl), not one file."""
    return Path(source).is_dir() or _is_archive(Path(source))


def find_file(source: str | os.PathLike[str], name: str, known: set[str]) -> FoundFile | list[str]:
    """Read the pattern file called name out of a release; where it is not there, give those of `known` that are.

    In an archive it is a regular file minference/configs/NAME, with or without one folder above; links are not
    followed. In a folder it lies directly inside, in configs, or in minference/configs; the first of these counts.

    source: folder or archive, see `is_release`. name: of the file. known: names of files to list.
    Raises: ValueError when an archive is damaged, encrypted, has the file twice, or a .tar.gz has more than MAX_BYTES
    unpacked; OSError when source or the file cannot be read.
    """
    source = Path(source)
    if _is_archive(source) and not source.is_dir():
        return _find_in_archive(source, name, known)
    folders = [source, source / _CONFIGS[-1], source.joinpath(*_CONFIGS)]
    for folder in folders:
        if (folder / name).is_file():
            return FoundFile(read_raw(folder / name), str(folder / name))
    return sorted(each for each in known if any((folder / each).is_file() for folder in folders))


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_TARS + _ZIPS)


def _find_in_archive(archive: Path, name: str, known: set[str]) -> FoundFile | list[str]:
    file = archive.open("rb")  # closed below; that it can't be opened is not damage
    open_members = _tar_members if archive.name.lower().endswith(_TARS) else _zip_members
    raw = None
    try:
        with file, open_members(file) as members:
            found = [(path, open_) for path, open_ in members if _is_pattern_file(PurePosixPath(path))]
            wanted = [(path, open_) for path, open_ in found if PurePosixPath(path).name == name]
            if len(wanted) == 1:
                with wanted[0][1]() as member:
                    raw = member.read(MAX_BYTES + 1)  # to the end, where a zip file has the checksum
    except _DAMAGE as error:
        raise ValueError(f"{archive} can't be unpacked: {str(error) or 'it is cut short'}") from None
    if raw is not None:
        return FoundFile(raw, f"{archive}/{wanted[0][0]}")
    if wanted:
        raise ValueError(f"{archive} has {name} {len(wanted)} times; give the right one itself")
    return sorted({PurePosixPath(path).name for path, _ in found} & known)


def _is_pattern_file(path: PurePosixPath) -> bool:
    top = path.parts[:-3]
    is_place = path.parts[-3:-1] == _CONFIGS and len(top) <= 1 and top not in (("..",), ("/",))
    return is_place and str(path).isprintable()


_Members = list[tuple[str, Callable[[], IO[bytes]]]]


@contextlib.contextmanager
def _tar_members(archive: IO[bytes]) -> Iterator[_Members]:
    with gzip.open(archive) as unpacked:
        raw = unpacked.read(MAX_BYTES + 1)  # with its checksum
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes; unpack it and give the folder")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        plain = [info for info in tar if info.isreg() and not info.issparse()]
        yield [(info.name, partial(_open_tarred, tar, info)) for info in plain]


def _open_tarred(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    member = tar.extractfile(info)
    if member is None:
        raise ValueError(f"{info.name} is not a file")
    return member


@contextlib.contextmanager
def _zip_members(archive: IO[bytes]) -> Iterator[_Members]:
    with zipfile.ZipFile(archive) as members:
        kinds = [(info, stat.S_IFMT(info.external_attr >> 16)) for info in members.infolist() if not info.is_dir()]
        plain = [info for info, kind in kinds if kind in (0, stat.S_IFREG)]  # 0: written where there are no kinds
        yield [(info.filename, partial(_open_zipped, members, info)) for info in plain]


def _open_zipped(members: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed by another method than deflate")
    return members.open(info)

"""The GGUF container: metadata and tensors of one file, or of one member of a .whl or .zip.

Source: the GGUF specification of the ggml project, versions 2 and 3, little-endian. The `gguf` package supplies the
tables of types and dequantises; its reader is not used, because it maps a whole file (it can't read inside an archive),
takes seconds for a vocabulary and gives no clear error for a file that is cut short.
"""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from minference_jax.convert.weight_source import DTYPES, TensorInfo

SUFFIX = ".gguf"
ARCHIVES = (".whl", ".zip")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where metadata does not say otherwise
_MAX_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}

# Types that are read as they are; all others are dequantised to float32.
_PLAIN = {
    GGMLQuantizationType.F32: DTYPES["float32"],
    GGMLQuantizationType.F16: DTYPES["float16"],
    GGMLQuantizationType.BF16: DTYPES["bfloat16"],
}


class _Stored(NamedTuple):
    """A tensor's place in the data section: bytes [start, start + size)."""

    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """An opened GGUF file. Opening reads the header; tensors are read when asked for.

    Args:
        path: the file; an archive (.whl, .zip) that holds one .gguf member; or archive/member where it holds several.
            A member that is compressed is unpacked into a nameless temporary file, one that is stored is read in place.

    Attributes:
        name: the path, and the member where there is one.
        metadata: key -> int, float, bool, str, list of str, or numpy array of numbers.
        tensors: name -> shape (outermost axis first, as numpy) and dtype after dequantising.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, cut short, of an unknown tensor type, an archive without exactly
            one .gguf member.
    """

    metadata: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path):
        self._file, self._start, self._size, self.name = _open(path)
        try:
            self._file.seek(self._start)
            self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised where its type is a quantised one.

        Raises:
            ValueError: the file became shorter after it was opened.
        """
        stored, info = self._stored[name], self.tensors[name]
        self._file.seek(self._start + stored.start)
        data = np.fromfile(self._file, np.uint8, stored.size)
        if len(data) != stored.size:
            raise ValueError(f"{self.name} is cut short: {name} needs {stored.size} bytes, {len(data)} are there")
        if stored.kind in _PLAIN:
            return data.view(info.dtype).reshape(info.shape)
        return dequantize(data.reshape(quant_shape_to_byte_shape(info.shape, stored.kind)), stored.kind)

    def close(self) -> None:
        """Closes the file (and so removes the temporary one)."""
        self._file.close()

    def _read_header(self) -> None:
        if (magic := self._bytes(4)) != _MAGIC:
            raise ValueError(f"{self.name} is not a GGUF file: it begins with {magic!r}")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"{self.name} is GGUF version {version}; supported: {_VERSIONS}, little-endian")
        tensor_count, pair_count = self._number("<Q"), self._number("<Q")
        self.metadata = {}
        for _ in range(pair_count):
            key = self._string()
            if key in self.metadata:
                raise ValueError(f"{self.name} has {key} twice")
            self.metadata[key] = self._value(self._kind())
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.name}: general.alignment={alignment!r} must be an integer of at least 1")
        header = self._file.tell() - self._start
        self._place_tensors(entries, -(-header // alignment) * alignment)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{self.name} is damaged: {name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]  # innermost first in the file
        return name, shape, self._number("<I"), self._number("<Q")

    def _place_tensors(self, entries: list[tuple[str, tuple[int, ...], int, int]], data_start: int) -> None:
        self._stored: dict[str, _Stored] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, shape, code, offset in entries:
            if name in tensors:
                raise ValueError(f"{self.name} has the tensor {name} twice")
            kind = _tensor_type(code, f"{self.name}: {name}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not shape or 0 in shape or shape[-1] % block:
                raise ValueError(f"{self.name} is damaged: {name} {list(shape)} does not fit blocks of {block}")
            size = math.prod(shape) // block * block_bytes
            stored = _Stored(kind, data_start + offset, size)
            if stored.start + size > self._size:
                raise ValueError(
                    f"{self.name} is cut short: {name} ends at byte {stored.start + size}, the file at {self._size}"
                )
            self._stored[name] = stored
            tensors[name] = TensorInfo(shape, _PLAIN.get(kind, DTYPES["float32"]))
        self.tensors = tensors

    def _bytes(self, count: int) -> bytes:
        left = self._start + self._size - self._file.tell()
        if count > left:
            raise ValueError(f"{self.name} is cut short: its header needs {count - left} bytes more")
        return self._file.read(count)

    def check_types(self, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
        """Makes sure that metadata has the types that the specification gives it.

        Args:
            kinds: key -> type or types; a key that the file lacks is no fault.

        Raises:
            ValueError: names the first key of another type.
        """
        for key, kind in kinds.items():
            value = self.metadata.get(key)
            if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
                continue
            raise ValueError(f"{self.name}: {key} has the wrong type: {type(value).__name__}")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _string(self) -> str:
        raw = self._bytes(self._number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} is damaged: text in its header is not UTF-8 ({error.reason})") from None

    def _kind(self) -> GGUFValueType:
        code = self._number("<I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise ValueError(f"{self.name} is damaged: metadata of type {code}") from None

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._number(_SCALARS[kind])
        inner, count = self._kind(), self._number("<Q")
        if inner == GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        if inner == GGUFValueType.ARRAY:
            raise ValueError(f"{self.name} has metadata with arrays of arrays, which is not supported")
        dtype = np.dtype(_SCALARS[inner])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)


def _tensor_type(code: int, what: str) -> GGMLQuantizationType:
    """The type of a tensor, one that can be read."""
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise ValueError(f"{what} has the unknown type {code}") from None
    if kind not in _PLAIN:
        _, block_bytes = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(f"{what} has type {kind.name}, which is not supported") from None
    return kind


def _open(path: Path) -> tuple[BinaryIO, int, int, str]:
    """The file, where the GGUF begins in it and how long it is, and its name."""
    archive = next((parent for parent in (path, *path.parents) if parent.is_file()), None)
    if archive is None:
        raise ValueError(f"{path} does not exist")
    if archive.suffix in ARCHIVES:
        return _open_member(archive, path.relative_to(archive).as_posix())
    if archive != path:
        raise ValueError(f"{path} does not exist: {archive} is a file, not an archive ({', '.join(ARCHIVES)})")
    return path.open("rb"), 0, path.stat().st_size, str(path)


def _open_member(archive: Path, wanted: str) -> tuple[BinaryIO, int, int, str]:
    try:
        with zipfile.ZipFile(archive) as members:
            info = members.getinfo(_choose_member(archive, members.namelist(), wanted))
            name = f"{archive}/{info.filename}"
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                return archive.open("rb"), _data_offset(archive, info), info.file_size, name
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - closed by GGUFFile.close
            with members.open(info) as packed:  # the checksum is verified at its end
                shutil.copyfileobj(packed, unpacked, 2**20)
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{archive} can't be unpacked: {error}") from None
    unpacked.seek(0)
    return unpacked, 0, info.file_size, name


def _choose_member(archive: Path, names: list[str], wanted: str) -> str:
    found = [name for name in names if name.endswith(SUFFIX)]
    if wanted != ".":
        if wanted not in found:
            raise ValueError(f"{archive} has no member {wanted}; its GGUF members: {', '.join(found) or 'none'}")
        return wanted
    if len(found) != 1:
        hint = f"name one as {archive}/{found[0]}" if found else "one is needed"
        raise ValueError(f"{archive} holds {len(found)} GGUF members ({', '.join(found) or 'none'}): {hint}")
    return found[0]


def _data_offset(archive: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: behind its local header, whose name and extra field vary in length."""
    fixed = 30
    with archive.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(fixed)
    if len(header) != fixed or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return info.header_offset + fixed + name_length + extra_length

"""Measured tile sizes, by device, implementation, head_dim and dtype, and the JSON file that keeps them.

{"format": "minference-jax tiles", "version": 1, "devices": {"NVIDIA H100 80GB HBM3": {"triton": {"head_dim 128,
bfloat16": {"block_q": 64, "block_kv": 64, "num_warps": 4, "num_stages": 3, "measured_ms": 1.9, "heuristic_ms": 2.0}}}}}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minference_jax.kernels.tiles import DTYPES, Device, TileConfig
from minference_jax.short_repr import short_repr

FORMAT_NAME = "minference-jax tiles"
FORMAT_VERSION = 1
MAX_BYTES = 2**22  # an entry has 0.2 kB; more is another file
MAX_SIZE = 2**12  # of any size of a tile: far above what runs

_SIZES = tuple(field.name for field in dataclasses.fields(TileConfig))
_TIMES = ("measured_ms", "heuristic_ms")
_KEY = re.compile(rf"head_dim ([1-9][0-9]{{0,3}}), ({'|'.join(DTYPES)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileEntry:
    """The choice for one kind of device, implementation, head_dim and dtype.

    Args:
        device: kind of the device, such as "NVIDIA H100 80GB HBM3".
        implementation: of the attention: "mosaic_gpu", "triton" or "xla".
        head_dim: H, from 1 to 9999.
        dtype: of q, k and v: "float32", "bfloat16" or "float16".
        tiles: the choice.
        measured_ms: its time, in milliseconds; None = not known.
        heuristic_ms: the time of the tiles that the device has without a table, in the same run; None = not known.

    Raises:
        ValueError: a value is not as above.
    """

    device: str
    implementation: str
    head_dim: int
    dtype: str
    tiles: TileConfig
    measured_ms: float | None = None
    heuristic_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("device", "implementation"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={short_repr(value)} must be a name")
        if not _KEY.fullmatch(self.key):
            raise ValueError(
                f"head_dim={short_repr(self.head_dim)} and dtype={short_repr(self.dtype)} must be an integer from 1 to "
                f"9999 and one of {', '.join(DTYPES)}"
            )
        for name, size in dataclasses.asdict(self.tiles).items():
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise ValueError(f"{name}={short_repr(size)} must be an integer from 1 to {MAX_SIZE}")
        for name in _TIMES:
            time = getattr(self, name)
            if time is not None and not (type(time) in (int, float) and time > 0 and math.isfinite(time)):
                raise ValueError(f"{name}={short_repr(time)} must be a positive number of milliseconds or null")

    @property
    def key(self) -> str:
        """What stands in front of it in the file."""
        return f"head_dim {self.head_dim}, {self.dtype}"

    @property
    def place(self) -> tuple[str, str, str]:
        """What there is one entry for in a table."""
        return self.device, self.implementation, self.key


@dataclasses.dataclass(frozen=True)
class TileTable:
    """Measured tile sizes of any number of devices, one choice per implementation, head_dim and dtype of each.

    Args:
        entries: the choices; those of one device and implementation are put side by side, where the first of them is.

    Raises:
        ValueError: two entries are for the same thing.
    """

    entries: tuple[TileEntry, ...] = ()

    def __post_init__(self) -> None:
        places = [entry.place for entry in self.entries]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(f"there are two entries for {', '.join(place)}")
        devices, groups = ([place[:depth] for place in places] for depth in (1, 2))
        in_order = sorted(
            self.entries, key=lambda entry: (devices.index(entry.place[:1]), groups.index(entry.place[:2]))
        )
        object.__setattr__(self, "entries", tuple(in_order))  # as in the file, so that `find` gives the same after it

    def find(self, device: Device, implementation: str | None, head_dim: int, dtype: str) -> TileConfig | None:
        """The stored tiles for a call, or None where there are none.

        Args:
            device: where the call runs; its kind counts.
            implementation: of the attention; None = that of the first entry for the other three.
            head_dim: H.
            dtype: of q, k and v, as a string.
        """
        for entry in self.entries:
            known = (entry.device, entry.head_dim, entry.dtype) == (device.kind, head_dim, str(dtype))
            if known and implementation in (None, entry.implementation):
                return entry.tiles
        return None

    def with_entry(self, entry: TileEntry) -> TileTable:
        """The table with an entry in place of the one for the same thing, or behind the others where there is none."""
        if entry.place in [old.place for old in self.entries]:
            return TileTable(tuple(entry if old.place == entry.place else old for old in self.entries))
        return TileTable((*self.entries, entry))


def read_tiles(path: str | os.PathLike[str]) -> TileTable:
    """Reads a file of measured tile sizes, as `minference-jax autotune` writes it.

    Args:
        path: of a JSON file (UTF-8).

    Raises:
        ValueError: the file is damaged or something else; the sentence names the file and the place in it.
        OSError: it can't be read.
    """
    with Path(path).open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    with _at(str(Path(path))):
        return TileTable(tuple(_entries(_parse(raw))))


def write_tiles(path: str | os.PathLike[str], table: TileTable) -> None:
    """Writes a table, replacing a file that is there; a failed write leaves the old file as it was.

    Args:
        path: of the file; its folder is made where there is none.
        table: all that the file is to hold.

    Raises:
        OSError: it can't be written.
    """
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in table.entries:
        fields = dataclasses.asdict(entry.tiles) | {name: getattr(entry, name) for name in _TIMES}
        devices.setdefault(entry.device, {}).setdefault(entry.implementation, {})[entry.key] = fields
    content = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "devices": devices}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Says where, in front of what an error says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short_repr(next(name for name in names if names.count(name) > 1))} is given twice")
    return made


def _parse(raw: bytes) -> Any:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes is too long for a file of tile sizes")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply for a file of tile sizes") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{short_repr(value)} must be an object of {what}")
    return value


def _entries(content: object) -> Iterator[TileEntry]:
    if not isinstance(content, dict) or content.get("format") != FORMAT_NAME:
        raise ValueError(f'without "format": "{FORMAT_NAME}" it is not a file of tile sizes')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"version={short_repr(version)} must be a positive integer")
    if version > FORMAT_VERSION:
        raise ValueError(f"version {short_repr(version)} needs a newer minference-jax: this one reads {FORMAT_VERSION}")
    _check_names(content, {"format", "version", "devices"}, set())
    with _at("devices"):
        devices = _object(content["devices"], "devices")
    for device, implementations in devices.items():
        with _at(short_repr(device)):
            implementations = _object(implementations, "implementations")
        for implementation, choices in implementations.items():
            with _at(f"{short_repr(device)}, {short_repr(implementation)}"):
                choices = _object(choices, "choices")
            for key, fields in choices.items():
                with _at(f"{short_repr(device)}, {short_repr(implementation)}, {short_repr(key)}"):
                    entry = _entry(device, implementation, key, fields)
                yield entry


def _entry(device: str, implementation: str, key: str, fields: object) -> TileEntry:
    found = _KEY.fullmatch(key)
    if not found:
        raise ValueError(f'a choice is for "head_dim N, DTYPE", with DTYPE one of {", ".join(DTYPES)}')
    fields = _object(fields, "sizes")
    _check_names(fields, set(_SIZES), set(_TIMES))
    for name in _SIZES:
        if type(fields[name]) is not int:
            raise ValueError(f"{name}={short_repr(fields[name])} must be an integer")
    return TileEntry(
        device=device,
        implementation=implementation,
        head_dim=int(found[1]),
        dtype=found[2],
        tiles=TileConfig(**{name: fields[name] for name in _SIZES}),
        **{name: fields.get(name) for name in _TIMES},
    )


def _check_names(given: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    for what, names in (("unknown field", given.keys() - needed - optional), ("missing field", needed - given.keys())):
        if names:
            raise ValueError(f"{what} {', '.join(short_repr(name) for name in sorted(names))}")

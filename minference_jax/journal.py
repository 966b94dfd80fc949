"""The journal of a long run: an append-only file of JSON lines with which an interrupted run goes on.

The first line is {"format": NAME, "version": 1, "settings": {...}}; what the others hold is for the run to say. A last
line without its line feed was being written when the run was ended: it is taken off, and that part is done again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minference_jax.short_repr import short_repr

_MOST_DIFFERENCES = 3  # that a refusal names
_NOTHING = object()


class Format(NamedTuple):
    """What a journal is of.

    Attributes:
        name: in its first line.
        version: that this code writes and reads.
        what: the kind of run in words, such as "a search".
    """

    name: str
    version: int
    what: str


class Journal:
    """The journal at a path, begun or taken up; a file that is empty or has no results yet is begun anew.

    Args:
        path: of the file; its folder is made where there is none. None = nothing is kept.
        form: what it is of.
        settings: JSON object of all that the run's results depend on.
        read: called with the fields of every line behind the first, in order; raises ValueError where they are wrong.

    Raises:
        ValueError: the file is damaged or something else, of a newer version, or of a run with other settings.
        OSError: it can't be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        form: Format,
        settings: Mapping[str, Any],
        read: Callable[[dict[str, Any]], None],
    ):
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        head = _line({"format": form.name, "version": form.version, "settings": settings})
        raw = self._path.read_bytes() if self._path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        begun = head.partition(b",")[0]
        if not whole and (begun.startswith(raw) or raw.startswith(begun)):  # killed before the first line was written
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(head, "wb")
            return
        first, _, results = whole.partition(b"\n")
        try:
            _check_head(first, form, json.loads(head)["settings"] if results else None)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        if not results:
            self._write(head, "wb")
            return
        for number, line in enumerate(whole.split(b"\n")[1:-1], 2):
            try:
                read(_object(line))
            except ValueError as error:
                raise ValueError(f"{self._path}: line {number}: {error}") from None
        if whole != raw:
            os.truncate(self._path, len(whole))

    def append(self, fields: Mapping[str, Any]) -> None:
        """Writes a line; it is on the disk when this returns."""
        if self._path is not None:
            self._write(_line(fields), "ab")

    def _write(self, line: bytes, mode: str) -> None:
        with open(self._path, mode) as file:  # type: ignore[arg-type]
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{short_repr(value)} must be an object")
    return value


def _check_head(line: bytes, form: Format, settings: dict[str, Any] | None) -> None:
    """Refuses a first line of something else, or of other settings; None = these do not matter."""
    try:
        head = _object(line)
    except ValueError:
        head = {}
    if head.get("format") != form.name:
        raise ValueError(f'without "format": "{form.name}" in its first line it is not the journal of {form.what}')
    version = head.get("version")
    if type(version) is int and version > form.version:
        raise ValueError(f"version {version} needs a newer minference-jax: this one reads {form.version}")
    if type(version) is int and 0 < version < form.version:
        raise ValueError(
            f"version {version} is of an older minference-jax, this one goes on with {form.version} only: remove it, "
            "or name another file"
        )
    if version != form.version or type(version) is not int:
        raise ValueError(f"version {short_repr(version)} must be {form.version}")
    check_fields(head, {"format": TEXT, "version": WHOLE, "settings": OBJECT})
    different = [] if settings is None else list(_differences(head["settings"], settings))
    if different:
        more = len(different) - _MOST_DIFFERENCES
        named = "; ".join(different[:_MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(
            f"it is the journal of {form.what} with other settings ({named}): remove it, or name another file"
        )


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """What differs, each as one phrase, as deep down as it can be named."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            inner = f"{place}.{name}" if place else name
            yield from _differences(there.get(name, _NOTHING), here.get(name, _NOTHING), inner)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from _differences(*pair, f"{place}[{index}]")
    elif there != here:
        old, new = ("nothing" if value is _NOTHING else _shown(value) for value in (there, here))
        yield f"{place}: {old} there, {new} here"


def _shown(value: Any) -> str:
    """A value in few signs: of an object the fact alone that it is there."""
    return "something" if isinstance(value, dict) else short_repr(value)


class Check(NamedTuple):
    """What a field must be: `is_right` says whether a value is, `what` says it in words."""

    is_right: Callable[[Any], bool]
    what: str


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


TEXT = Check(lambda value: isinstance(value, str), "a text")
WHOLE = Check(lambda value: type(value) is int and value >= 0, "an integer of at least 0")
COUNT = Check(lambda value: type(value) is int and value >= 1, "an integer of at least 1")
NUMBER = Check(_is_number, "a finite number")
NOT_NEGATIVE = Check(lambda value: _is_number(value) and value >= 0, "a finite number of at least 0")
SHARE = Check(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
OBJECT = Check(lambda value: isinstance(value, dict), "an object")
LIST = Check(lambda value: isinstance(value, list), "a list")


def or_null(check: Check) -> Check:
    """What may also be null."""
    return Check(lambda value: value is None or check.is_right(value), f"{check.what} or null")


def list_of(check: Check, count: int | None = None) -> Check:
    """A list of which every entry is right, of so many entries; None = of any number."""

    def is_right(value: Any) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(map(check.is_right, value))

    return Check(is_right, f"a list of {'' if count is None else f'{count} entries, each '}{check.what}")


def check_fields(value: object, checks: Mapping[str, Check]) -> None:
    """Refuses what is no object of exactly these fields, each as it must be.

    Raises:
        ValueError: in one sentence that names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{short_repr(value)} must be an object")
    for what, names in (("missing", checks.keys() - value.keys()), ("unknown", value.keys() - checks.keys())):
        if names:
            raise ValueError(f"{what} field {', '.join(map(short_repr, sorted(names)))}")
    for name, check in checks.items():
        if not check.is_right(value[name]):
            raise ValueError(f"{name}={short_repr(value[name])} must be {check.what}")

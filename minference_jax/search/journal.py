"""The journal of a search: what it was asked, then a line for each finished layer. It is what makes it resumable.

JSON lines. The first is {"format": "minference-jax/search", "version": 1, "settings": {...}}; each other one a layer:
{"layer": 0, "output_norms": [...], "candidates": [{"candidate": {"kind": ..., sizes}, "budget": 0.3, "patterns": [...],
"cost": [...], "density": [...], "error": [...]}, ...]} with null for a head at which a candidate can't keep within the
budget. A last line without its line feed was being written when the search was ended: that layer is searched again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from minference_jax.patterns import HeadPattern
from minference_jax.patterns.heads import KINDS, at
from minference_jax.search.results import CandidateResult, LayerResult

FORMAT_NAME, FORMAT_VERSION = "minference-jax/search", 1
_TYPES = {kind.name.lower(): type_ for type_, kind in KINDS.items()}


class Journal:
    """The journal at a path, begun or taken up.

    Args:
        path: of the file; None = nothing is kept, and every search begins anew.
        settings: JSON object of all that the result depends on.

    Attributes:
        layers: the layers that are finished already.

    Raises:
        ValueError: the file is damaged or something else, or of a search with other settings.
        OSError: it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]):
        self._path = None if path is None else Path(path)
        self.layers: list[LayerResult] = []
        if self._path is None:
            return
        if not self._path.exists() or self._path.stat().st_size == 0:  # empty: killed before the header was written
            header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "settings": settings}
            self._path.write_text(json.dumps(header, allow_nan=False) + "\n", encoding="utf-8")
            return
        with at(str(self._path)):
            whole = self._read(json.loads(json.dumps(settings)))
        with self._path.open("r+b") as file:
            file.truncate(whole)

    def add(self, layer: LayerResult) -> None:
        """Keeps a finished layer; it is on the disk when this returns."""
        self.layers.append(layer)
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_layer_fields(layer), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, settings: dict[str, Any]) -> int:
        """Reads the finished layers; gives how many bytes whole lines take."""
        raw = self._path.read_bytes()  # type: ignore[union-attr]
        head, *lines = raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1] or [b""]
        header = _object(head)
        if header.get("format") != FORMAT_NAME:
            raise ValueError(f'without "format": "{FORMAT_NAME}" in its first line it is not the journal of a search')
        if header.get("version") != FORMAT_VERSION:
            raise ValueError(f"version {short_repr(header.get('version'))} is not {FORMAT_VERSION}, which this reads")
        found = header.get("settings")
        if found != settings:
            names = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
            raise ValueError(
                f"it is the journal of a search with other settings ({', '.join(names) or 'more of them'}): remove it, "
                f"or name another output"
            )
        for index, line in enumerate(lines):
            with at(f"line {index + 2}"):
                self.layers.append(_layer(_object(line), index))
        return raw.rfind(b"\n") + 1


def pattern_fields(pattern: HeadPattern | None) -> dict[str, Any] | None:
    """A head pattern as JSON has it: kind and sizes."""
    return None if pattern is None else {"kind": KINDS[type(pattern)].name.lower(), **vars(pattern)}


def _layer_fields(layer: LayerResult) -> dict[str, Any]:
    candidates = [
        one._asdict()
        | {"candidate": pattern_fields(one.candidate), "patterns": [pattern_fields(x) for x in one.patterns]}
        for one in layer.candidates
    ]
    return layer._asdict() | {"candidates": candidates}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{short_repr(value)} must be an object")
    return value


def _layer(fields: dict[str, Any], index: int) -> LayerResult:
    if fields.get("layer") != index:
        raise ValueError(f"layer={short_repr(fields.get('layer'))} must be {index}: layers follow one another")
    try:
        candidates = [
            CandidateResult(
                candidate=_TYPES[one["candidate"].pop("kind")](**one["candidate"]),
                budget=one["budget"],
                patterns=tuple(None if x is None else _TYPES[x.pop("kind")](**x) for x in one["patterns"]),
                **{name: tuple(one[name]) for name in ("cost", "density", "error")},
            )
            for one in fields["candidates"]
        ]
        return LayerResult(index, tuple(candidates), tuple(fields["output_norms"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not what a search writes: {error!r}") from None

"""The journal of a search: what it was asked, then a line for each finished layer. It is what makes it resumable.

A layer's line: {"layer": 0, "output_norms": [...], "candidates": [{"candidate": {"kind": ..., sizes}, "budget": 0.3,
"patterns": [...], "cost": [...], "density": [...], "error": [...]}, ...]}, with null for a head at which a candidate
can't keep within the budget. Where heads may stay dense, the last candidate is dense attention.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

from minference_jax import journal
from minference_jax.journal import LIST, NOT_NEGATIVE, NUMBER, OBJECT, WHOLE, Check, check_fields, list_of, or_null
from minference_jax.patterns import HeadPattern
from minference_jax.patterns.heads import KINDS
from minference_jax.search.results import CandidateResult, LayerResult
from minference_jax.short_repr import short_repr

FORMAT = journal.Format("minference-jax/search", 2, "a search")
_TYPES = {kind.name.lower(): type_ for type_, kind in KINDS.items()}
_DENSE = {"kind": "dense"}
_COLUMNS = ("cost", "density", "error")


class Journal:
    """The journal at a path, begun or taken up.

    Args:
        path: of the file; None = nothing is kept, and every search begins anew.
        settings: JSON object of all that the result depends on, with num_layers, num_heads, candidates,
            budgets and dense_heads.

    Attributes:
        layers: the layers that are finished already.

    Raises:
        ValueError: the file is damaged or something else, or of a search with other settings.
        OSError: it can't be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]):
        self.layers: list[LayerResult] = []
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._file = journal.Journal(path, FORMAT, settings, self._read)

    def add(self, layer: LayerResult) -> None:
        """Keeps a finished layer; it is on the disk when this returns."""
        self._file.append(_layer_fields(layer))
        self.layers.append(layer)

    def _read(self, fields: dict[str, Any]) -> None:
        if len(self.layers) == self._settings["num_layers"]:
            raise ValueError(f"the model has {len(self.layers)} layers, and this is one more")
        self.layers.append(_layer(fields, len(self.layers), self._settings))


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


def _layer(fields: dict[str, Any], index: int, settings: Mapping[str, Any]) -> LayerResult:
    """A layer of a line; raises ValueError where it is not the next one of a search with these settings."""
    heads = settings["num_heads"]
    check_fields(fields, {"layer": WHOLE, "output_norms": list_of(NOT_NEGATIVE, heads), "candidates": LIST})
    if fields["layer"] != index:
        raise ValueError(f"layer={fields['layer']} must be {index}: layers follow one another")
    asked = list(itertools.product(settings["candidates"], settings["budgets"]))
    if settings["dense_heads"]:
        asked.append((_DENSE, 1.0))
    if len(fields["candidates"]) != len(asked):
        raise ValueError(f"it has {len(fields['candidates'])} results, the settings ask for {len(asked)}")
    found = [_result(one, *what, heads) for one, what in zip(fields["candidates"], asked, strict=True)]
    return LayerResult(index, tuple(found), tuple(fields["output_norms"]))


def _result(fields: object, candidate: dict[str, Any], budget: float, heads: int) -> CandidateResult:
    may_miss = (lambda check: check) if candidate == _DENSE else or_null  # dense attention can always be had
    checks = {"candidate": OBJECT, "budget": NUMBER, "patterns": list_of(may_miss(OBJECT), heads)}
    check_fields(fields, checks | dict.fromkeys(_COLUMNS, list_of(may_miss(NOT_NEGATIVE), heads)))
    known: Any = fields
    for name, wanted in (("candidate", candidate), ("budget", budget)):
        if known[name] != wanted:
            raise ValueError(f"{name}={short_repr(known[name])} stands where the settings have {short_repr(wanted)}")
    patterns = tuple(None if one is None else _pattern(one, candidate["kind"]) for one in known["patterns"])
    for name in _COLUMNS:
        if [one is None for one in known[name]] != [one is None for one in patterns]:
            raise ValueError(f"{name} must be null where there is no pattern, and nowhere else")
    columns = {name: tuple(known[name]) for name in _COLUMNS}
    return CandidateResult(_pattern(candidate, candidate["kind"]), budget, patterns, **columns)


def _pattern(fields: Mapping[str, Any], kind: str) -> HeadPattern:
    """A head pattern of that kind; its sizes are checked by its type."""
    names = [field.name for field in dataclasses.fields(_TYPES[kind])]
    check_fields(fields, {"kind": Check(lambda value: value == kind, repr(kind))} | dict.fromkeys(names, WHOLE))
    return _TYPES[kind](**{name: fields[name] for name in names})

"""Pattern files: two formats, told apart by content.

* ours, a JSON object, versioned: {"format": "minference-jax/patterns", "version": 1, "model": name or absent,
  "source": how the patterns were made, or absent, "slash_granularity": "line" or "block", or absent,
  "score": {"name": ..., "direction": "higher_is_better" or "lower_is_better"} or null,
  "layers": [[{"kind": "vertical_slash", "vertical_size": 500, "slash_size": 700, "score": 0.9}, ...], ...]}
* published, the JSON array of the MInference release: one object per layer; key = query-head index as a string;
  value = [kind, size1, size2, score] with kind "vertical_and_slash" (vertical_size, slash_size), "stream_llm"
  (sink_size, window_size) or "block_sparse" (num_blocks, 1). What a score measures differs between those files and none
  says it: scores are read and kept, never compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from minference_jax.patterns.heads import (
    KINDS,
    MAX_HEADS,
    MAX_LAYERS,
    PUBLISHED_DEFAULT,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    ModelPatterns,
    VerticalSlash,
    at,
    check_score,
    check_score_meaning,
    check_size,
)
from minference_jax.short_repr import short_repr

FORMAT_NAME = "minference-jax/patterns"
FORMAT_VERSION = 1
MAX_BYTES = 2**26  # the largest published file has 0.3 MB; more is another file, such as weights

_OUR_NAMES: dict[str, type[HeadPattern]] = {kind.name.lower(): type_ for type_, kind in KINDS.items()}
_PUBLISHED_NAMES: dict[str, type[HeadPattern]] = {
    "vertical_and_slash": VerticalSlash,
    "stream_llm": AShape,
    "block_sparse": BlockSparse,
}


def read_patterns(path: str | os.PathLike[str]) -> ModelPatterns:
    """Read a pattern file in our format or in the published one, told apart by content.

    In a published file a head that is left out has PUBLISHED_DEFAULT; the number of heads is the highest index in the
    file plus one; a null score means none; a block_sparse head is [kind, num_blocks, 1, score], the only second size
    that the release's search writes, and any other is refused, since it would mean nothing.

    path: str or path of a JSON file (UTF-8).
    Raises: ValueError, in one sentence that names the file and, where there is one, the layer and the head, when the
    content is not exactly one of the two formats; OSError when the file cannot be read.
    """
    return parse_patterns(read_raw(path), str(Path(path)))


def read_raw(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of a file, at most MAX_BYTES + 1, which `parse_patterns` refuses.

    path: str or path of the file. Raises: OSError when it cannot be read.
    """
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def parse_patterns(raw: bytes, source: str) -> ModelPatterns:
    """Read the content of a pattern file, as `read_patterns`.

    raw: the bytes of the file. source: what to call it, in errors and as the patterns' source.
    Raises: ValueError, in one sentence that names the source, when raw is not exactly one of the two formats.
    """
    with at(source):
        content = _parse(raw)
        if isinstance(content, list):
            return _from_published(content, source)
        if isinstance(content, dict):
            return _from_ours(content, source)
        raise ValueError("a pattern file holds a JSON array (published format) or object (minference-jax format)")


def write_patterns(
    patterns: ModelPatterns,
    path: str | os.PathLike[str],
    format: Literal["minference-jax", "published"] = "minference-jax",
) -> None:
    """Write a pattern file, replacing one that is there; a failed write leaves the old file as it was.

    The published format says neither the model, the source nor what the scores measure, so those are not in such a
    file. It has no place for a granularity either: patterns that were searched for "block" are not written so. A head
    that has PUBLISHED_DEFAULT and no score is left out of it, which is how that format says it, unless nothing else
    would tell the number of heads.

    patterns: what to write. path: str or path of the file. format: "minference-jax" (all of it) or "published".
    Raises: ValueError when format is neither, or it is "published" and a head is dense, for which that has no name, or
    the patterns were searched for "block"; OSError when the file cannot be written.
    """
    if format == "minference-jax":
        content: object = _to_ours(patterns)
    elif format == "published":
        content = _to_published(patterns)
    else:
        raise ValueError(f"{format=} must be 'minference-jax' or 'published'")
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


class _Object(dict[str, Any]):
    """A JSON object that remembers a name given twice: only its reader knows where in the file that is."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = next((name for name in names if names.count(name) > 1), None) if len(self) < len(names) else None


def _parse(raw: bytes) -> object:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes is too long for a pattern file")
    if not raw.strip():
        raise ValueError("the file is empty")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_Object, parse_int=_integer)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply for a pattern file") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _integer(digits: str) -> int | str:
    """Leave an integer too long for int() as text: the check of its value can then name its layer and head."""
    return int(digits) if len(digits) < 400 else digits


def _object(value: object, what: str, member: str = "field") -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise ValueError(f"{short_repr(value)} must be {what}")
    if value.twice is not None:
        raise ValueError(f"{member} {short_repr(value.twice)} is given twice")
    return value


def _check_fields(given: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    for what, names in (("unknown field", given.keys() - needed - optional), ("missing field", needed - given.keys())):
        if names:
            raise ValueError(f"{what} {', '.join(short_repr(name) for name in sorted(names))}")


def _field_names(type_: type[HeadPattern]) -> list[str]:
    return [field.name for field in dataclasses.fields(type_)]


def _type_named(kind: object, types: dict[str, type[HeadPattern]]) -> type[HeadPattern]:
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(f"kind {short_repr(kind)} must be one of {', '.join(types)}")
    return types[kind]


def _some(scores: list[tuple[float | None, ...]]) -> tuple[tuple[float | None, ...], ...] | None:
    return tuple(scores) if any(score is not None for row in scores for score in row) else None


def _from_published(content: list[Any], source: str) -> ModelPatterns:
    check_size("num_layers", len(content), MAX_LAYERS)
    rows: list[dict[int, tuple[HeadPattern, float | None]]] = []
    for i, layer in enumerate(content):
        rows.append({})
        with at(f"layer {i}"):
            heads = _object(layer, "an object from head indices to patterns", member="head")
        for key, value in heads.items():
            with at(f"layer {i}, head {short_repr(key)}"):
                if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key) or int(key) >= MAX_HEADS:
                    raise ValueError(f"a head index must be an integer from 0 to {MAX_HEADS - 1}")
                rows[i][int(key)] = _published_head(value)
    num_heads = 1 + max((head for row in rows for head in row), default=-1)
    if num_heads == 0:
        raise ValueError("no layer names a head")
    full = [[row.get(head, (PUBLISHED_DEFAULT, None)) for head in range(num_heads)] for row in rows]
    return ModelPatterns(
        layers=tuple(tuple(pattern for pattern, _ in row) for row in full),
        scores=_some([tuple(score for _, score in row) for row in full]),
        source=source,
    )


def _published_head(value: object) -> tuple[HeadPattern, float | None]:
    if not (isinstance(value, list) and len(value) == 4):
        raise ValueError(f"{short_repr(value)} must be [kind, size1, size2, score]")
    kind, first, second, score = value
    type_ = _type_named(kind, _PUBLISHED_NAMES)
    check_score(score)
    if type_ is BlockSparse:
        if second != 1 or type(second) is not int:
            raise ValueError(f"the second size of block_sparse, {short_repr(second)}, must be 1: it has no meaning")
        return BlockSparse(num_blocks=first), score
    return type_(**dict(zip(_field_names(type_), (first, second), strict=True))), score


def _from_ours(content: dict[str, Any], source: str) -> ModelPatterns:
    content = _object(content, "an object")
    if content.get("format") != FORMAT_NAME:
        raise ValueError(f'a JSON object without "format": "{FORMAT_NAME}" is not a pattern file')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"version={short_repr(version)} must be a positive integer")
    if version > FORMAT_VERSION:
        raise ValueError(f"version {short_repr(version)} needs a newer minference-jax: this one reads {FORMAT_VERSION}")
    _check_fields(content, {"format", "version", "layers"}, {"model", "score", "source", "slash_granularity"})
    made = content.get("source")
    if made is not None and not (isinstance(made, str) and made):
        raise ValueError(f"source={short_repr(made)} must be a text that says how the patterns were made")
    meaning: dict[str, Any] = {"name": None, "direction": None}
    if content.get("score") is not None:
        with at("score"):
            meaning = _object(content["score"], "an object with name and direction, or null")
            _check_fields(meaning, {"name", "direction"}, set())
            check_score_meaning(**meaning)
    if not isinstance(content["layers"], list):
        raise ValueError(f"layers={short_repr(content['layers'])} must be an array")
    layers: list[tuple[HeadPattern, ...]] = []
    scores: list[tuple[float | None, ...]] = []
    for i, layer in enumerate(content["layers"]):
        if not (isinstance(layer, list) and layer):
            raise ValueError(f"layer {i}: {short_repr(layer)} must be an array with an object for each head")
        heads = []
        for j, value in enumerate(layer):
            with at(f"layer {i}, head {j}"):
                heads.append(_our_head(value))
        layers.append(tuple(pattern for pattern, _ in heads))
        scores.append(tuple(score for _, score in heads))
    return ModelPatterns(
        layers=tuple(layers),
        scores=_some(scores),
        score_name=meaning["name"],
        score_direction=meaning["direction"],
        model=content.get("model"),
        slash_granularity=content.get("slash_granularity"),
        made_by=made,
        source=source if made is None else f"{source} ({made})",
    )


def _our_head(value: object) -> tuple[HeadPattern, float | None]:
    fields = _object(value, "an object with kind and sizes")
    type_ = _type_named(fields.get("kind"), _OUR_NAMES)
    names = _field_names(type_)
    _check_fields(fields, {"kind", *names}, {"score"})
    check_score(fields.get("score"))
    return type_(**{name: fields[name] for name in names}), fields.get("score")


# --- writing ----------------------------------------------------------------------------------------------------------


def _to_ours(patterns: ModelPatterns) -> dict[str, Any]:
    layers: list[list[dict[str, Any]]] = []
    for i, layer in enumerate(patterns.layers):
        layers.append([{"kind": KINDS[type(head)].name.lower(), **vars(head)} for head in layer])
        for fields, score in zip(layers[i], patterns.scores[i] if patterns.scores else (), strict=False):
            if score is not None:
                fields["score"] = score
    meaning = {"name": patterns.score_name, "direction": patterns.score_direction} if patterns.score_name else None
    known = {"model": patterns.model, "source": patterns.made_by, "slash_granularity": patterns.slash_granularity}
    known = {name: value for name, value in known.items() if value is not None}
    return {"format": FORMAT_NAME, "version": FORMAT_VERSION, **known, "score": meaning, "layers": layers}


def _to_published(patterns: ModelPatterns) -> list[dict[str, list[Any]]]:
    if patterns.slash_granularity == "block":
        raise ValueError("the published format has no place for slash_granularity='block', which the patterns need")
    names = {type_: name for name, type_ in _PUBLISHED_NAMES.items()}
    rows: list[dict[str, list[Any]]] = []
    for i, layer in enumerate(patterns.layers):
        rows.append({})
        for j, head in enumerate(layer):
            score = patterns.scores[i][j] if patterns.scores else None
            if isinstance(head, Dense):
                raise ValueError(f"layer {i}, head {j} is dense, for which the published format has no name")
            if head != PUBLISHED_DEFAULT or score is not None:
                sizes = [head.num_blocks, 1] if isinstance(head, BlockSparse) else list(vars(head).values())
                rows[i][str(j)] = [names[type(head)], *sizes, score]
    last = str(patterns.num_heads - 1)
    if not any(last in row for row in rows):  # the file must tell how many heads there are
        rows[0][last] = [names[VerticalSlash], *vars(PUBLISHED_DEFAULT).values(), None]
    return rows

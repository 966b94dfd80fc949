"""Which published pattern file is for a model, by its name or else by its config, read from where the user has it.

The files are not part of this package: users bring one, a folder of them, or a MInference release.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from minference_jax.patterns.files import parse_patterns, read_raw
from minference_jax.patterns.heads import ModelPatterns
from minference_jax.patterns.published import PUBLISHED, PublishedFile
from minference_jax.patterns.release import FoundFile, find_file, is_release
from minference_jax.short_repr import short_repr

_QUANTISATION = re.compile(r"[-._](I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)  # how names of GGUF files end
_HUB_CACHE = re.compile(r"models--.+?--(.+)")  # a folder of the Hugging Face cache
_BY_NAME = {
    PurePath(model_id).name.lower(): row for row in PUBLISHED for ids in row.models.values() for model_id in ids
}


class ConfigSignature(NamedTuple):
    """What in a config tells models apart, as the config has it; None where it does not say.

    Attributes:
        model_type: name of the architecture.
        num_layers, num_heads, vocab_size: layers, query heads of each, tokens of the vocabulary.
        context: tokens that the model was made for.
    """

    model_type: Any
    num_layers: Any
    num_heads: Any
    vocab_size: Any
    context: Any

    def __str__(self) -> str:
        kind, layers, heads, vocabulary, context = map(short_repr, self)
        return f"model_type {kind}, {layers} layers of {heads} heads, vocabulary {vocabulary}, context {context}"


class PatternChoice(NamedTuple):
    """The name of the published file that is for a model, and why, as what follows "because"."""

    file: str
    why: str


class ResolvedPatterns(NamedTuple):
    """The pattern file that a path stands for.

    Attributes:
        patterns: of every head; `patterns.source` is the place and, where the file was chosen, why.
        raw: the bytes of the file.
        place: path of the file; of one in an archive, the archive's path and the path within it.
        why: this file, as what follows "because".
    """

    patterns: ModelPatterns
    raw: bytes
    place: str
    why: str


def config_signature(config: Mapping[str, Any]) -> ConfigSignature:
    """Take what tells models apart from the content of a config.json, ChatGLM's own names included.

    config: content of a Hugging Face config.json. Raises: nothing.
    """

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    return ConfigSignature(
        model_type=first("model_type"),
        num_layers=first("num_hidden_layers", "num_layers"),
        num_heads=first("num_attention_heads"),
        vocab_size=first("vocab_size", "padded_vocab_size"),
        context=first("max_position_embeddings", "seq_length"),
    )


def choose_published(model: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> PatternChoice:
    """Choose the published file for a model: by its name, else by the name in its config, else by the config's sizes.

    Of a name the last part counts, in any casing: "organisation/name", the name of a folder, of a GGUF file with or
    without its quantisation, or of a folder of the Hugging Face cache.

    model: hub id or path, as the user calls it; nothing is read from it. config: content of its config.json; None = the
    name alone decides.
    Raises: ValueError when no file is known to be for the model, or the config is that of models with different files.
    """
    if found := _by_name(os.path.abspath(model)):
        return PatternChoice(found[1].file, f"the model is called {found[0]}")
    if config is None:
        raise ValueError(_nothing_for(model, "its name is not that of a model that has one, and no config was there"))
    stored = config.get("_name_or_path")
    looked_at = "its name"
    if isinstance(stored, str) and stored:
        if found := _by_name(stored):
            return PatternChoice(found[1].file, f"its config calls the model {found[0]}")
        looked_at += f", the name in its config, {short_repr(stored)},"
    signature = config_signature(config)
    rows = [(row, context) for row in PUBLISHED for context in row.models if _has(row, context, signature)]
    names = [PurePath(row.models[context][0]).name for row, context in rows]
    if len(rows) == 1:
        return PatternChoice(rows[0][0].file, f"its config ({signature}) is that of {names[0]}")
    if rows:
        reason = f"its config ({signature}) is that of {' and of '.join(names)}, and its name does not tell which it is"
        raise ValueError(_nothing_for(model, reason))
    raise ValueError(
        _nothing_for(model, f"neither {looked_at} nor its config ({signature}) is that of a model with one")
    )


def resolve_patterns(
    source: str | os.PathLike[str], model: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> ResolvedPatterns:
    """Read the patterns that a path stands for: a pattern file itself, or the published one for a model in a release.

    Whether they fit the model is for the caller to check: `ModelPatterns.check`.

    source: pattern file (ours or published), folder of published files, or MInference release as a file (.tar.gz, .tgz,
    .zip, .whl) or folder. model, config: as in `choose_published`; not used where source is a pattern file.
    Raises: ValueError when no file is known for the model, the file is not in source, or it or the archive is damaged;
    OSError when source cannot be read.
    """
    if not is_release(source):
        place, raw, why = str(Path(source)), read_raw(source), "it was given itself"
        return ResolvedPatterns(parse_patterns(raw, place), raw, place, why)
    file, why = choose_published(model, config)
    found = find_file(source, file, {row.file for row in PUBLISHED})
    if not isinstance(found, FoundFile):
        there = f"there are {', '.join(found)}" if found else "there is no published pattern file"
        raise ValueError(f"{source} has no {file}, which is needed because {why}; in {source} {there}")
    patterns = replace(parse_patterns(*found), source=f"{found.place}, because {why}")
    return ResolvedPatterns(patterns, *found, why)


def _by_name(name: str) -> tuple[str, PublishedFile] | None:
    for candidate in _names(PurePath(name)):
        if candidate.lower() in _BY_NAME:
            return candidate, _BY_NAME[candidate.lower()]
    return None


def _names(path: PurePath) -> Iterator[str]:
    yield path.name
    if path.suffix.lower() == ".gguf":
        yield path.stem
        yield _QUANTISATION.sub("", path.stem)
        yield path.parent.name
    yield from (match[1] for part in path.parts if (match := _HUB_CACHE.fullmatch(part)))


def _has(row: PublishedFile, context: int, signature: ConfigSignature) -> bool:
    sizes = (row.num_layers, row.num_heads, row.vocab_size, context)
    return signature.model_type in row.model_types and signature[1:] == sizes


def _nothing_for(model: str | os.PathLike[str], reason: str) -> str:
    return f"no published pattern file can be chosen for {model}: {reason}; give a pattern file itself"

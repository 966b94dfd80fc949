"""`minference-jax patterns show` and `check`."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import groupby

from minference_jax.patterns import HeadPattern, ModelPatterns, read_patterns
from minference_jax.patterns.heads import KINDS


def run(arguments: argparse.Namespace) -> None:
    """Reads the file, checks it against the model where one is given, and prints what was asked for."""
    patterns = read_patterns(arguments.file)
    fits = ""
    if arguments.model is not None:
        from minference_jax.convert.checkpoint import load_config  # imports jax, which a file alone does not need

        config = load_config(arguments.model)
        patterns.check(config.num_layers, config.num_heads)
        fits = f", fits {arguments.model}"
    print(f"{arguments.file}: {patterns.num_layers} layers of {patterns.num_heads} heads{fits}")
    if arguments.action == "show":
        print("\n".join(table(patterns)))


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

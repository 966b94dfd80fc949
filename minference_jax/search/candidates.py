"""Candidates: kinds of patterns with proportions of sizes; how large they are follows from the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from minference_jax.estimate import MIN_SLASHES, MIN_VERTICALS, NUM_BLOCKS_UNIT
from minference_jax.patterns import (
    DEFAULT_PATTERN,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    PatternArrays,
    VerticalSlash,
)
from minference_jax.patterns.heads import KINDS

DEFAULT_CANDIDATES: tuple[HeadPattern, ...] = (
    AShape(sink_size=1024, window_size=4096),
    VerticalSlash(vertical_size=30, slash_size=2048),
    VerticalSlash(vertical_size=100, slash_size=1800),
    VerticalSlash(vertical_size=500, slash_size=1500),
    DEFAULT_PATTERN,
    VerticalSlash(vertical_size=3000, slash_size=200),
    BlockSparse(num_blocks=100),
)
"""Those of arXiv 2407.02490 and the default pattern, for the gap between their proportions, which are all that counts:
each is made smaller or larger until it costs the budget."""

_LEAST = {"vertical_size": MIN_VERTICALS, "slash_size": MIN_SLASHES}  # smaller ones run as these


def check_candidates(candidates: Iterable[HeadPattern]) -> tuple[HeadPattern, ...]:
    """The candidates, where a search can compare them.

    Raises:
        ValueError: there is none, two are one in kind and proportions, one is dense or no pattern.
    """
    candidates = tuple(candidates) if isinstance(candidates, Iterable) else (candidates,)
    if not candidates:
        raise ValueError("at least one candidate is needed, got none")
    for index, candidate in enumerate(candidates):
        if type(candidate) not in KINDS or isinstance(candidate, Dense):
            raise ValueError(f"candidate {candidate!r} must be a VerticalSlash, an AShape or a BlockSparse")
        for other in candidates[:index]:
            if candidate == other:
                raise ValueError(f"candidate {candidate} is given twice")
            if _proportions(candidate) == _proportions(other):
                raise ValueError(f"candidate {candidate} has the proportions of {other}, which are all that counts")
    return candidates


def _proportions(candidate: HeadPattern) -> tuple[object, ...]:
    sizes = vars(candidate).values()
    return type(candidate), *(size // math.gcd(*sizes) for size in sizes)


def limits_of(candidate: HeadPattern, size: int) -> dict[str, tuple[int, int]]:
    """The least and the largest that each size of a kind can usefully be on prompts of at most `size` tokens."""
    names = [field.name for field in dataclasses.fields(candidate)]
    whole = {name: -(-size // NUM_BLOCKS_UNIT) if name == "num_blocks" else size for name in names}
    return {name: (min(_LEAST.get(name, 1), whole[name]), whole[name]) for name in names}


def scaled(candidate: HeadPattern, scale: np.ndarray, size: int) -> PatternArrays:
    """A candidate made smaller or larger for each head, in its proportions as far as `limits_of` lets it.

    Args:
        candidate: not dense.
        scale: float64 [N], what its sizes are multiplied with.
        size: most tokens of a prompt.

    Returns:
        numpy int32 [N].
    """
    zeros = np.zeros(scale.shape, np.int32)
    fields = dict.fromkeys(PatternArrays._fields, zeros)
    fields["kind"] = np.full(scale.shape, KINDS[type(candidate)], np.int32)
    for name, (least, most) in limits_of(candidate, size).items():
        fields[name] = np.clip(np.rint(scale * getattr(candidate, name)), least, most).astype(np.int32)
    return PatternArrays(**fields)


def scale_range(candidate: HeadPattern, size: int) -> tuple[float, float]:
    """The scales at which a candidate's sizes are all at their least, and all at their largest."""
    pairs = [(*limits, getattr(candidate, name)) for name, limits in limits_of(candidate, size).items()]
    return min(least / given for least, _, given in pairs), max(most / given for _, most, given in pairs)


def head_patterns(candidate: HeadPattern, sizes: PatternArrays) -> tuple[HeadPattern, ...]:
    """The arrays of `scaled` as one pattern for each head."""
    names = [field.name for field in dataclasses.fields(candidate)]
    columns = [getattr(sizes, name).tolist() for name in names]
    return tuple(type(candidate)(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True))

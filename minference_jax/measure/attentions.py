"""A choice of attention: its name, its sizes, and how to call it in a report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from minference_jax.attention import a_shape_attention, block_sparse_attention, vertical_slash_attention
from minference_jax.index import SlashGranularity
from minference_jax.patterns import AShape, BlockSparse, HeadPattern, VerticalSlash

SIZES = ("vertical_size", "slash_size", "sink_size", "window_size", "num_blocks")
"""Every size that some pattern has."""

_UNIFORM: dict[str, tuple[type[HeadPattern], Callable[..., object]]] = {
    "vertical_slash": (VerticalSlash, vertical_slash_attention),
    "a_shape": (AShape, a_shape_attention),
    "block_sparse": (BlockSparse, block_sparse_attention),
}


class ChosenAttention(NamedTuple):
    """What `LanguageModel.prefill` takes to choose attention, and how to call it in a report."""

    name: str
    pattern: HeadPattern | None
    description: str
    slash_granularity: SlashGranularity = "line"


DENSE = ChosenAttention("dense", None, "dense")
"""Exact attention, which the others are compared with."""


def default_sizes(name: str) -> dict[str, int]:
    """The sizes of an attention that has one pattern for every head, as the library's function has them; else none."""
    if name not in _UNIFORM:
        return {}
    parameters = inspect.signature(_UNIFORM[name][1]).parameters
    return {size: parameter.default for size, parameter in parameters.items() if size in SIZES}


def takes_granularity(name: str) -> bool:
    """Whether an attention can have vertical-slash heads."""
    return name in ("minference", "auto", "vertical_slash")


def attention_of(
    name: str, sizes: Mapping[str, int] | None = None, slash_granularity: SlashGranularity | None = None
) -> ChosenAttention:
    """The attention of a name.

    Args:
        name: as in `LanguageModel.prefill`.
        sizes: of its pattern; None, and what is not given: the library's own.
        slash_granularity: of its vertical-slash heads; None = "line".

    Raises:
        ValueError: a size or a granularity that the attention does not have, or a size below 1.
    """
    if slash_granularity is not None and not takes_granularity(name):
        raise ValueError(f"slash_granularity does not go with {name} attention")
    defaults = default_sizes(name)
    if foreign := [size for size in sizes or {} if size not in defaults]:
        raise ValueError(f"{foreign[0]} does not go with {name} attention")
    if not defaults:
        return ChosenAttention(name, None, name, slash_granularity or "line")
    pattern = _UNIFORM[name][0](**(defaults | dict(sizes or {})))
    return ChosenAttention(name, pattern, f"{pattern} for every head", slash_granularity or "line")

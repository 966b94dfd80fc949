"""The attention that a prefill asks for by name, as what a model's `attend` argument takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from minference_jax.attention import dense_attention, sparse_attention
from minference_jax.capacities import Capacities, capacities_for
from minference_jax.implementations import Implementation
from minference_jax.index import NUM_BLOCKS_UNIT, SlashGranularity
from minference_jax.kernels.tiles import TileConfig
from minference_jax.models import Attend
from minference_jax.patterns import (
    AShape,
    BlockSparse,
    HeadPattern,
    ModelPatterns,
    PatternArrays,
    PatternKind,
    VerticalSlash,
    uniform_patterns,
)

_UNIFORM: dict[str, type[AShape] | type[VerticalSlash] | type[BlockSparse]] = {
    "a_shape": AShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
}
ATTENTION_NAMES = ("minference", "auto", "dense", *_UNIFORM)
"""What `attention` may be: the model's own patterns, these where the prompt is long enough for them to pay and exact
attention where it is not, exact attention, or one pattern for every head."""

_PAYS_FROM, _PAYS_BELOW = 8, 0.5
"""Prompts this many times as long as what an average head asks for: slashes come in runs with gaps, and tiles cover two
to three times what was asked. They then are this share of dense attention's. Dense heads are a part of it: what the
others save shrinks to nothing as the share of dense heads grows to that, and lengths grow in the same measure."""


@dataclass(frozen=True, kw_only=True)
class DenseAttend:
    """Exact attention, an `Attend`. Equal ones share compiled programs.

    Attributes:
        implementation: None = the first that can.
        whole_prompt: whether the queries start at position 0, which q_offset, as an array, does not tell.
    """

    implementation: str | None
    whole_prompt: bool = True

    def __call__(self, q, k, v, layer_input, *, scale, q_offset, kv_len) -> tuple[Any, None]:
        where = {"kv_len": kv_len} if self.whole_prompt else {"kv_len": kv_len, "q_offset": q_offset}
        return dense_attention(q, k, v, scale=scale, **where, implementation=self.implementation), None


@dataclass(frozen=True, kw_only=True)
class SparseAttend:
    """Each head by its own pattern; an `Attend` whose layer input is PatternArrays [N]. Also gives density [B, N]."""

    implementation: str | None
    slash_granularity: SlashGranularity
    capacities: Capacities
    tiles: TileConfig | None

    def __call__(self, q, k, v, layer_input: PatternArrays, *, scale, q_offset, kv_len) -> Any:
        return sparse_attention(
            q,
            k,
            v,
            layer_input,
            scale=scale,
            q_offset=q_offset,
            kv_len=kv_len,
            return_density=True,
            slash_granularity=self.slash_granularity,
            max_num_blocks=self.capacities.num_blocks,
            max_num_columns=self.capacities.num_columns,
            implementation=self.implementation,
            tiles=self.tiles,
        )


def choose_attend(
    attention: str,
    pattern: HeadPattern | ModelPatterns | None,
    *,
    patterns: ModelPatterns,
    slash_granularity: SlashGranularity,
    implementation: str | None,
    tiles: TileConfig | None,
    whole_prompt: bool = True,
) -> tuple[Attend, PatternArrays | None]:
    """How to attend, static and hashable, and the pattern arrays [L, N] that go in as data.

    Args:
        attention: one of `ATTENTION_NAMES`, "auto" resolved.
        pattern: sizes of a uniform pattern; for "minference", other patterns than the model's; None for "dense".
        patterns: the model's own.
        slash_granularity: "line" or "block", as in `sparse_attention`.
        implementation: of the attention; None = the first that can.
        tiles: of sparse attention; None = those that suit the device.
        whole_prompt: whether the queries are those of whole prompts; False = they may follow others in the cache.

    Raises:
        ValueError: an unknown name, a pattern that does not belong to it, or patterns for another granularity.
    """
    if slash_granularity not in get_args(SlashGranularity):
        raise ValueError(f'{slash_granularity=} must be "line" or "block"')
    if attention not in ATTENTION_NAMES:
        raise ValueError(f"{attention=} must be one of {', '.join(ATTENTION_NAMES)}")
    if attention == "dense":
        if pattern is not None:
            raise ValueError(f"attention='dense' takes no pattern, got {pattern}")
        return DenseAttend(implementation=implementation, whole_prompt=whole_prompt), None
    shape = patterns.num_layers, patterns.num_heads
    if attention == "minference":
        if not isinstance(pattern, ModelPatterns | None):
            raise ValueError(f"attention='minference' takes ModelPatterns or None, got {pattern!r}")
        patterns = patterns if pattern is None else pattern
        patterns.check(*shape)
        patterns.check_granularity(slash_granularity)
    else:
        kind = _UNIFORM[attention]
        if not isinstance(pattern, kind):
            raise ValueError(f"{attention=} needs pattern={kind.__name__}(...) with its sizes, got {pattern!r}")
        patterns = uniform_patterns(*shape, pattern)
    capacities = capacities_for(patterns.max_num_blocks, patterns.max_num_columns)
    attend = SparseAttend(
        implementation=implementation, slash_granularity=slash_granularity, capacities=capacities, tiles=tiles
    )
    return attend, patterns.arrays()


def resolve_auto(
    pattern: HeadPattern | ModelPatterns | None,
    *,
    patterns: ModelPatterns,
    length: int,
    implementation: Implementation,
) -> tuple[str, ModelPatterns | None]:
    """What "auto" stands for at a length: "minference" where it pays, else "dense", each with its pattern.

    Args:
        pattern: other patterns than the model's; None = the model's.
        patterns: the model's own.
        length: tokens that the prefill computes, padding included.
        implementation: what would run sparse attention.

    Raises:
        ValueError: a pattern for one kind of head.
    """
    if not isinstance(pattern, ModelPatterns | None):
        raise ValueError(f"attention='auto' takes ModelPatterns or None, got {pattern!r}")
    pays = pays_from(pattern or patterns, implementation)
    return ("minference", pattern) if pays is not None and length >= pays else ("dense", None)


def pays_from(patterns: ModelPatterns, implementation: Implementation) -> int | None:
    """Tokens of a prompt from which sparse attention is expected to be faster than dense, by a rule of thumb.

    Args:
        patterns: of every head.
        implementation: what would run sparse attention.

    Returns:
        None where half of the heads or more are dense: the rule then expects it at no length. The more are, the longer
        the prompt must be.
    """
    sizes = patterns.arrays()
    kinds = PatternKind
    asked = np.select(
        [sizes.kind == kinds.VERTICAL_SLASH, sizes.kind == kinds.A_SHAPE, sizes.kind == kinds.BLOCK_SPARSE],
        [
            sizes.vertical_size + sizes.slash_size,
            sizes.sink_size + sizes.window_size,
            sizes.num_blocks * NUM_BLOCKS_UNIT,
        ],
        default=0,
    )
    saved = 1 - float((sizes.kind == kinds.DENSE).mean()) / _PAYS_BELOW
    if saved <= 0:
        return None
    return math.ceil(max(implementation.break_even, _PAYS_FROM * float(asked.mean())) / saved)

"""The attentions that an evaluation compares: dense, and others under names of their own, each with its patterns."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.analysis import settings_for
from minference_jax.attention import sparse_attention
from minference_jax.generate import ATTENTION_NAMES, LanguageModel, bucket_length
from minference_jax.generate.attend import choose_attend
from minference_jax.implementations import named
from minference_jax.index import SlashGranularity
from minference_jax.patterns import AShape, HeadPattern, ModelPatterns, PatternArrays, PatternKind

_WINDOW_STEP = 64  # tokens: kernels work in tiles, and finer windows cost the same


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An attention under test.

    Args:
        name: how results call it.
        attention: as in `LanguageModel.prefill`; not "auto", which would mix two attentions under one name.
        pattern: as there; for "minference" None = the model's own.
        slash_granularity: "line" or "block", as there.
        implementation: as there; None = the first that can.
        equal_cost_to: name of another contender. This one is then an A-shape of `sink_size` for every head, whose
            window is chosen for every prompt so that it computes as many tiles as the other did; None = no such thing.
        sink_size: tokens, for `equal_cost_to`.

    Raises:
        ValueError: an unknown attention, no name, or options that contradict each other.
    """

    name: str
    attention: str = "minference"
    pattern: HeadPattern | ModelPatterns | None = None
    slash_granularity: SlashGranularity = "line"
    implementation: str | None = None
    equal_cost_to: str | None = None
    sink_size: int = 128

    def __post_init__(self) -> None:
        allowed = [name for name in ATTENTION_NAMES if name != "auto"]
        if self.attention not in allowed:
            raise ValueError(f"attention={self.attention!r} of {self.name!r} is not one of {', '.join(allowed)}")
        if not self.name or (self.name == "dense") != (self.attention == "dense"):
            raise ValueError(f"name={self.name!r}: a contender needs a name, which is dense where its attention is")
        if self.equal_cost_to is not None and (self.attention != "a_shape" or self.pattern is not None):
            raise ValueError(f"{self.name}: equal_cost_to goes with attention='a_shape' and no pattern")
        if self.sink_size < 1:
            raise ValueError(f"{self.name}: sink_size={self.sink_size} must be at least 1")

    def settings(self, model: LanguageModel) -> dict[str, Any]:
        """What its results depend on beside the model, as plain JSON; patterns also as a digest of every head's sizes.

        Of the tiles that run here it has the two sizes that change what is kept.

        Raises:
            ValueError: patterns that do not fit the model, an unknown granularity or implementation.
            NotImplementedError: the named implementation can't run sparse attention there.
        """
        fields = ("attention", "implementation", "equal_cost_to")
        facts = {name: getattr(self, name) for name in fields} | {"sink_size": self.sink_size}
        if self.equal_cost_to is None:
            facts["sink_size"] = None
        patterns, digest, tiles = self.check(model), None, None
        if isinstance(patterns, ModelPatterns):
            sizes = b"".join(np.asarray(x).tobytes() for x in patterns.arrays())
            digest = hashlib.sha256(sizes).hexdigest()[:16]
        if self.attention == "dense":
            named(self.implementation)
        else:
            how: Any = {"slash_granularity": self.slash_granularity, "implementation": self.implementation}
            chosen = settings_for(model, **how).tiles
            tiles = {"block_q": chosen.block_q, "block_kv": chosen.block_kv}
        facts |= {"slash_granularity": self.slash_granularity, "tiles": tiles}
        return facts | {"pattern": describe(patterns), "pattern_sha256": digest}

    def check(self, model: LanguageModel) -> HeadPattern | ModelPatterns | None:
        """The pattern that it has with a model.

        Raises:
            ValueError: it does not fit the attention or the model.
        """
        if self.equal_cost_to is not None:
            return None
        try:
            choose_attend(
                self.attention,
                self.pattern,
                patterns=model.patterns,
                slash_granularity=self.slash_granularity,
                implementation=self.implementation,
                tiles=None,
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return model.patterns if self.attention == "minference" and self.pattern is None else self.pattern


def contender_settings(ordered: Sequence[Contender], model: LanguageModel) -> dict[str, dict[str, Any]]:
    """The settings of contenders by their names.

    Raises:
        ValueError: as `Contender.settings`; two are the same attention under two names.
        NotImplementedError: as there.
    """
    found = {one.name: one.settings(model) for one in ordered}
    seen: dict[str, str] = {}
    for name, facts in found.items():
        same = {key: value for key, value in facts.items() if key != "pattern" or facts["pattern_sha256"] is None}
        other = seen.setdefault(json.dumps(same, sort_keys=True), name)
        if other != name:
            raise ValueError(f"{other} and {name} are the same attention: leave one of them out")
    return found


def describe(pattern: HeadPattern | ModelPatterns | None) -> str | None:
    """A pattern in words, for records; None for attention that has none."""
    if isinstance(pattern, ModelPatterns):
        return pattern.source
    return None if pattern is None else f"{pattern} for every head"


def with_dense(contenders: Sequence[Contender]) -> tuple[Contender, ...]:
    """Dense attention first, then the other contenders.

    Raises:
        ValueError: two of one name, or one that is to cost as much as another which does not stand before it.
    """
    dense = [one for one in contenders if one.name == "dense"] or [Contender(name="dense", attention="dense")]
    ordered = (*dense, *(one for one in contenders if one.name != "dense"))
    names = [one.name for one in ordered]
    if len(set(names)) < len(names):
        raise ValueError(f"contenders must have names of their own, got {', '.join(names)}")
    for place, one in enumerate(ordered):
        if one.equal_cost_to is not None and one.equal_cost_to not in names[1:place]:
            raise ValueError(f"{one.name} is to cost as much as {one.equal_cost_to}, a sparse one that must come first")
    return ordered


def resolve(contender: Contender, model: LanguageModel, length: int, densities: dict[str, float]) -> dict[str, Any]:
    """What `LanguageModel.prefill` takes for a contender and a prompt.

    Args:
        contender: which.
        model: that reads.
        length: tokens of the prompt.
        densities: of the contenders that have read this prompt, by name.
    """
    pattern = contender.pattern
    if contender.equal_cost_to is not None:
        pattern = equal_cost_a_shape(
            model, length, densities[contender.equal_cost_to], contender.sink_size, contender.implementation
        )
    return {
        "attention": contender.attention,
        "pattern": pattern,
        "slash_granularity": contender.slash_granularity,
        "implementation": contender.implementation,
    }


def equal_cost_a_shape(
    model: LanguageModel, length: int, density: float, sink_size: int = 128, implementation: str | None = None
) -> AShape:
    """The A-shape whose share of dense attention's work is nearest to a given one.

    It is found by trying windows on one head of zeros, whose tiles are those of every head of the model.

    Args:
        model: whose head_dim, dtype and measured tile sizes count.
        length: tokens of the prompt.
        density: share to meet, above 0; from 1 on the window is the whole prompt.
        sink_size: tokens.
        implementation: of the attention; None = the first that can.

    Raises:
        ValueError: a length, density or sink_size that makes no sense.
    """
    if not density > 0 or length < 1:
        raise ValueError(f"{density=} must be above 0 and {length=} at least 1")

    def cost(steps: int) -> float:
        sizes = AShape(sink_size=sink_size, window_size=steps * _WINDOW_STEP)
        arrays = PatternArrays(
            *(jnp.full(1, getattr(sizes, name, 0), jnp.int32) for name in PatternArrays._fields)
        )._replace(kind=jnp.full(1, PatternKind.A_SHAPE, jnp.int32))
        return float(_one_head(arrays, jnp.int32(length), **static))

    static: Any = {
        "capacity": bucket_length(length),
        "head_dim": model.config.head_dim,
        "dtype": str(model.model.dtype),
        "sink_size": sink_size,
        "implementation": implementation,
        "tiles": model.sparse_on_device(implementation)[1],
    }
    low, high = 1, -(-length // _WINDOW_STEP)
    while low < high:  # the smallest window that costs no less
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= density else (middle + 1, high)
    steps = min((max(low - 1, 1), low), key=lambda steps: abs(cost(steps) - density))
    return AShape(sink_size=sink_size, window_size=steps * _WINDOW_STEP)


@functools.partial(jax.jit, static_argnames=("capacity", "head_dim", "dtype", "sink_size", "implementation", "tiles"))
def _one_head(pattern, length, *, capacity, head_dim, dtype, sink_size, implementation, tiles):
    zeros = jnp.zeros((1, capacity, 1, head_dim), dtype)
    options: Any = {"kv_len": length, "tiles": tiles, "implementation": implementation, "max_num_blocks": 0}
    _, share = sparse_attention(
        zeros, zeros, zeros, pattern, return_density=True, max_num_columns=min(sink_size, capacity), **options
    )
    return share[0, 0]

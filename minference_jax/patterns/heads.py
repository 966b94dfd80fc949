"""Head patterns as plain data: how each attention head of each layer is to be sparse."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from minference_jax.short_repr import short_repr

if TYPE_CHECKING:
    import jax

MAX_SIZE = 2**31 - 1  # sizes become int32 arrays
MAX_LAYERS = MAX_HEADS = 1024  # more is a mistake, not a model: filled with defaults it would take the memory

ScoreDirection: TypeAlias = Literal["higher_is_better", "lower_is_better"]
SlashGranularity: TypeAlias = Literal["line", "block"]
Int32Array: TypeAlias = "jax.Array | npt.NDArray[np.int32]"


class PatternKind(enum.IntEnum):
    """The code of each kind of pattern in PatternArrays.kind; the lower-case name is its name in our files."""

    VERTICAL_SLASH = 0
    A_SHAPE = 1
    BLOCK_SPARSE = 2
    DENSE = 3


def check_size(name: str, value: object, largest: int = MAX_SIZE) -> None:
    """Refuse what is not an int from 1 to largest."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={short_repr(value)} must be an integer")
    if not 1 <= value <= largest:
        raise ValueError(f"{name}={short_repr(value)} must be from 1 to {largest}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash:
    """Keep the keys with the largest estimated attention and the diagonals with the largest estimated attention.

    vertical_size: int, number of key positions (tokens). slash_size: int, number of query-key distances (tokens).
    Raises: ValueError when a size is not an int from 1 to 2**31 - 1.
    Source: arXiv 2407.02490, section 3.2 ("vertical-slash").
    """

    vertical_size: int
    slash_size: int

    def __post_init__(self) -> None:
        check_size("vertical_size", self.vertical_size)
        check_size("slash_size", self.slash_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape:
    """Keep the first keys and a window of the nearest ones.

    sink_size: int, number of keys kept at the start (tokens). window_size: int, keys kept up to and with the query's
    own position (tokens).
    Raises: ValueError when a size is not an int from 1 to 2**31 - 1.
    Source: arXiv 2407.02490, section 3.2 ("A-shape"), `stream_llm` in the published files.
    """

    sink_size: int
    window_size: int

    def __post_init__(self) -> None:
        check_size("sink_size", self.sink_size)
        check_size("window_size", self.window_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Keep for every block of queries the first 64 keys, its own, and the heaviest blocks by estimate.

    num_blocks: int, key blocks kept for each query block (blocks).
    Raises: ValueError when num_blocks is not an int from 1 to 2**31 - 1.
    Source: arXiv 2407.02490, section 3.2 ("block-sparse").
    """

    num_blocks: int

    def __post_init__(self) -> None:
        check_size("num_blocks", self.num_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Keep every causal pair. Ours alone: the published format has no name for it."""


HeadPattern: TypeAlias = VerticalSlash | AShape | BlockSparse | Dense

PUBLISHED_DEFAULT = VerticalSlash(vertical_size=1000, slash_size=6096)
"""What a head that a published file leaves out means (the MInference release's own rule)."""

DEFAULT_PATTERN = VerticalSlash(vertical_size=500, slash_size=700)
"""What applies to every head where no pattern file is given."""

KINDS: dict[type[HeadPattern], PatternKind] = {
    VerticalSlash: PatternKind.VERTICAL_SLASH,
    AShape: PatternKind.A_SHAPE,
    BlockSparse: PatternKind.BLOCK_SPARSE,
    Dense: PatternKind.DENSE,
}
"""The code of each type of pattern."""


class PatternArrays(NamedTuple):
    """Head patterns as int32 arrays of one shape [..., N]: inputs of jitted functions, so new ones do not recompile.

    kind: codes of PatternKind. vertical_size, slash_size, sink_size, window_size: tokens. num_blocks: blocks.
    A size that a head's kind does not use is 0.
    """

    kind: Int32Array
    vertical_size: Int32Array
    slash_size: Int32Array
    sink_size: Int32Array
    window_size: Int32Array
    num_blocks: Int32Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPatterns:
    """The pattern of every head of every layer of one model.

    layers: L tuples of N head patterns each, L and N from 1 to 1024.
    scores: L tuples of N numbers each, None where a head has no score; None when no head has one. Never compared.
    score_name, score_direction: what the scores measure and which way is better; both None when that is not known.
    model: name of the model that the patterns are for; None when that is not known.
    slash_granularity: "line" or "block", what they were searched for, which vertical-slash heads must run with; None
        when that is not known.
    made_by: how they were made, in words, such as by which search; None when that is not known.
    source: what they were read from or made by, shown to users.
    Raises: ValueError when a field's type, length or value is wrong; it names the layer and the head.
    """

    layers: tuple[tuple[HeadPattern, ...], ...]
    scores: tuple[tuple[float | None, ...], ...] | None = None
    score_name: str | None = None
    score_direction: ScoreDirection | None = None
    model: str | None = None
    slash_granularity: SlashGranularity | None = None
    made_by: str | None = None
    source: str = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        _check_table("layers", self.layers, _check_head)
        if (self.score_name, self.score_direction) != (None, None):
            check_score_meaning(self.score_name, self.score_direction)
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ValueError(f"model={short_repr(self.model)} must be a name or None")
        if self.made_by is not None and not (isinstance(self.made_by, str) and self.made_by):
            raise ValueError(f"made_by={short_repr(self.made_by)} must be a text or None")
        if self.slash_granularity is not None and self.slash_granularity not in get_args(SlashGranularity):
            raise ValueError(f'slash_granularity={short_repr(self.slash_granularity)} must be "line", "block" or None')
        if self.scores is not None:
            _check_table("scores", self.scores, check_score)
            if (len(self.scores), len(self.scores[0])) != (self.num_layers, self.num_heads):
                raise ValueError(
                    f"scores of {len(self.scores)} layers of {len(self.scores[0])} heads must match the patterns' "
                    f"{self.num_layers} layers of {self.num_heads} heads"
                )

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """N, the number of query heads of each layer."""
        return len(self.layers[0])

    @property
    def max_num_blocks(self) -> int:
        """The largest num_blocks of any block-sparse head (blocks), 0 if there is none."""
        return max((h.num_blocks for layer in self.layers for h in layer if isinstance(h, BlockSparse)), default=0)

    @property
    def max_num_columns(self) -> int:
        """The most verticals or sinks that any head asks for (tokens), 0 if none asks for any."""
        sizes = self.arrays()
        verticals = np.where(sizes.kind == PatternKind.VERTICAL_SLASH, sizes.vertical_size, 0)
        return int(np.maximum(verticals, np.where(sizes.kind == PatternKind.A_SHAPE, sizes.sink_size, 0)).max())

    def arrays(self) -> PatternArrays:
        """Give the patterns as numpy int32 arrays [L, N], to hand to a jitted function."""
        sizes = {name: np.zeros((self.num_layers, self.num_heads), np.int32) for name in PatternArrays._fields}
        for i, layer in enumerate(self.layers):
            for j, head in enumerate(layer):
                sizes["kind"][i, j] = KINDS[type(head)]
                for name, value in vars(head).items():
                    sizes[name][i, j] = value
        return PatternArrays(**sizes)

    def check(self, num_layers: int, num_heads: int) -> None:
        """Check that the patterns fit a model of num_layers layers of num_heads query heads each.

        Raises: ValueError, in one sentence, naming the first layer or head without a counterpart.
        """
        if (num_layers, num_heads) == (self.num_layers, self.num_heads):
            return
        if self.num_layers != num_layers:
            layer, head = min(self.num_layers, num_layers), 0
            file_has_more = self.num_layers > num_layers
        else:
            layer, head = 0, min(self.num_heads, num_heads)
            file_has_more = self.num_heads > num_heads
        what = "is not in the model" if file_has_more else "of the model has no pattern"
        raise ValueError(
            f"{self.source}: patterns for {self.num_layers} layers of {self.num_heads} heads do not fit a model of "
            f"{num_layers} layers of {num_heads} heads: layer {layer}, head {head} {what}"
        )

    def described_for(self, model: str) -> str:
        """Give the source and, where that is another one than `model`, the name of the model that the patterns are for.

        model: name or path, of which the last part counts, in any casing: patterns of one model may well be used with
        another, such as a fine-tune of it, but users are to see it.
        """
        if self.model is None or _last_part(self.model) == _last_part(model):
            return self.source
        return f"{self.source}, searched for {self.model}"

    def check_granularity(self, asked: str) -> None:
        """Check that a call runs vertical-slash heads as they were searched for; asked: "line" or "block".

        Raises: ValueError, in one sentence, when the patterns say another granularity.
        """
        if self.slash_granularity not in (None, asked):
            raise ValueError(
                f"{self.source}: patterns were searched for slash_granularity={self.slash_granularity!r}, the call "
                f"asks for {asked!r}: give slash_granularity={self.slash_granularity!r}, on the command line "
                f"--slash-granularity {self.slash_granularity}"
            )


def uniform_patterns(num_layers: int, num_heads: int, pattern: HeadPattern = DEFAULT_PATTERN) -> ModelPatterns:
    """Give every head of a model of num_layers layers of num_heads query heads the same pattern.

    Raises: ValueError when a count is not an int from 1 to 1024 or pattern is not a head pattern.
    """
    check_size("num_layers", num_layers, MAX_LAYERS)
    check_size("num_heads", num_heads, MAX_HEADS)
    with at("pattern"):
        _check_head(pattern)
    return ModelPatterns(layers=((pattern,) * num_heads,) * num_layers, source=f"{pattern} for every head")


def _last_part(name: str) -> str:
    return PurePath(os.path.abspath(name)).name.lower()


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Say in every ValueError from inside the block where the mistake is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_table(name: str, table: object, check: Callable[[object], None]) -> None:
    if not (isinstance(table, tuple) and table and all(isinstance(row, tuple) and row for row in table)):
        raise ValueError(f"{name} must be a tuple of one tuple per layer with one entry per head, none of them empty")
    check_size("num_layers", len(table), MAX_LAYERS)
    check_size("num_heads", len(table[0]), MAX_HEADS)
    for i, row in enumerate(table):
        if len(row) != len(table[0]):
            raise ValueError(f"layer {i} has {len(row)} heads and layer 0 has {len(table[0])}: they must be equal")
        for j, value in enumerate(row):
            with at(f"layer {i}, head {j}"):
                check(value)


def _check_head(head: object) -> None:
    if type(head) not in KINDS:
        raise ValueError(f"{short_repr(head)} must be one of {', '.join(type_.__name__ for type_ in KINDS)}")


def check_score(score: object) -> None:
    """Refuse what is neither a finite number nor None."""
    if score is None:
        return
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"score={short_repr(score)} must be a number or null")
    if not abs(score) <= sys.float_info.max:  # NaN too
        raise ValueError(f"score={short_repr(score)} must be a finite number")


def check_score_meaning(name: object, direction: object) -> None:
    """Refuse a score's name that is no name and a direction that is not one of ScoreDirection."""
    if not (isinstance(name, str) and name):
        raise ValueError(f"the name of the score, {short_repr(name)}, must be a word that says what it measures")
    if direction not in get_args(ScoreDirection):
        choices = " or ".join(get_args(ScoreDirection))
        raise ValueError(f"the direction of the score, {short_repr(direction)}, must be {choices}")

"""The cases of the attention suite as data: what the heads keep, which lists the kernel reads, shapes and lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from minference_jax.index import SlashGranularity
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPattern, VerticalSlash

KIND_NAMES = {VerticalSlash: "VS", AShape: "A-shape", BlockSparse: "block-sparse", Dense: "dense"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all heads of a case keep up to some length.

    Args:
      pattern: of all heads.
      local_share: vertical-slash: share of the constructed slashes that are the nearest ones; the others are scattered.
      density: block-sparse: share of the causal blocks that the lists hold, in place of ``pattern.num_blocks``; None =
        the pattern's own number.
      up_to: longest prompt that has these sizes, in tokens; None = no bound.
    """

    pattern: HeadPattern
    local_share: float = 1.0
    density: float | None = None
    up_to: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark case.

    Args:
      name: the same at all lengths.
      sizes: the shortest prompts' first; the last has no bound.
      slash_granularity: "line" or "block", as in ``sparse_attention``.
      num_heads, num_kv_heads, head_dim: N, K, H.
      dtype: of q, k and v.
      lengths: where the case is measured unless others are asked for, in tokens.
    """

    name: str
    sizes: tuple[Sizes, ...]
    slash_granularity: SlashGranularity = "line"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    lengths: tuple[int, ...]

    def sizes_at(self, length: int, tiles: TileConfig) -> Sizes:
        """The sizes of prompts of ``length`` tokens; the number of listed blocks is that of these tiles."""
        sizes = next(sizes for sizes in self.sizes if sizes.up_to is None or length <= sizes.up_to)
        if sizes.density is None:
            return sizes
        blocks = -(-length // tiles.block_kv)
        # n blocks for each of B rows of a triangle keep about n B - n n / 2 of its B B / 2 blocks.
        count = max(1, round(blocks * (1 - math.sqrt(1 - sizes.density))))
        return dataclasses.replace(sizes, pattern=BlockSparse(num_blocks=count), density=None)

    def small(self) -> Case:
        """The same heads with a pattern of the same kind that leaves something out at a thousand tokens."""
        (last,) = self.sizes[-1:]
        patterns = {
            VerticalSlash: Sizes(
                pattern=VerticalSlash(vertical_size=100, slash_size=140), local_share=last.local_share
            ),
            AShape: Sizes(pattern=AShape(sink_size=100, window_size=300)),
            BlockSparse: Sizes(pattern=BlockSparse(num_blocks=1), density=0.3),
            Dense: Sizes(pattern=Dense()),
        }
        return dataclasses.replace(self, sizes=(patterns[type(last.pattern)],))


def describe(sizes: Sizes, tiles: TileConfig, constructed: bool) -> str:
    """A pattern's sizes in a table, and the kind of lists where they are constructed."""
    pattern = sizes.pattern
    if isinstance(pattern, VerticalSlash):
        share = f", {sizes.local_share:.0%} of slashes nearest" if constructed else ""
        return f"VS({pattern.vertical_size}, {pattern.slash_size}){share}"
    if isinstance(pattern, AShape):
        return f"{pattern.sink_size} sinks, window {pattern.window_size}"
    if isinstance(pattern, BlockSparse):
        return f"{pattern.num_blocks}{' random' if constructed else ''} blocks of {tiles.block_kv}"
    return "all keys"


def _near(share: float) -> Case:
    sizes = Sizes(pattern=VerticalSlash(vertical_size=500, slash_size=700), local_share=share)
    return Case(
        name=describe(sizes, TileConfig(), constructed=True),
        sizes=(sizes,),
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        dtype="float32",
        lengths=(4096, 8192, 16384, 32768),
    )


CPU_CASES = (_near(1.0), _near(0.97))
"""The shape of the default model."""

SHORT, MIDDLE, LONG = (8192, 32768), (131072,), (262144, 524288, 1048576)
_SLASHES = tuple(
    Sizes(pattern=VerticalSlash(vertical_size=1000, slash_size=size), local_share=share, up_to=up_to)
    for size, share, up_to in ((600, 0.97, 32768), (2048, 0.97, 131072), (6096, 0.98, None))
)
_LINE = Case(name="VS line", sizes=_SLASHES, lengths=(*SHORT, *MIDDLE, *LONG))
_FIXED = dataclasses.replace(_SLASHES[1], up_to=None)
_DENSE = Case(name="dense", sizes=(Sizes(pattern=Dense()),), lengths=(*SHORT, *MIDDLE))
GPU_CASES = (
    _LINE,
    dataclasses.replace(_LINE, name="VS line, fixed sizes", sizes=(_FIXED,), lengths=(*MIDDLE, LONG[-1])),
    dataclasses.replace(_LINE, name="VS block", slash_granularity="block"),
    Case(
        name="A-shape",
        sizes=(Sizes(pattern=AShape(sink_size=1024, window_size=4096)),),
        lengths=(*SHORT, *MIDDLE, *LONG),
    ),
    Case(name="block-sparse", sizes=(Sizes(pattern=BlockSparse(num_blocks=1), density=0.1),), lengths=MIDDLE),
    _DENSE,
    dataclasses.replace(_DENSE, name="dense, head_dim 256", head_dim=256, lengths=(32768,)),
    *(
        dataclasses.replace(_LINE, name=f"VS line, head_dim {head_dim}", head_dim=head_dim, lengths=(32768,))
        for head_dim in (64, 96, 256)
    ),
    *(
        dataclasses.replace(_LINE, name=f"VS line, {heads}", num_kv_heads=count, lengths=(32768,))
        for count, heads in ((1, "1 KV head"), (32, "32 KV heads"))
    ),
)
"""The shape of Llama 3 8B, and what is near it."""


def select_cases(cases: Sequence[Case], texts: Iterable[str] | None) -> list[Case]:
    """The cases that a text names, or whose names it is part of where it is no name itself; None = all.

    Raises:
      ValueError: a text belongs to no case.
    """
    if texts is None:
        return list(cases)
    names = [case.name for case in cases]
    chosen: set[str] = set()
    for text in texts:
        found = {text} & set(names) or {name for name in names if text in name}
        if not found:
            raise ValueError(f"no case has {text!r} in its name; there are {', '.join(map(repr, names))}")
        chosen |= found
    return [case for case in cases if case.name in chosen]


def activation_cases(cases: Sequence[Case], num_heads: int, num_kv_heads: int, head_dim: int) -> list[Case]:
    """The patterns whose lists are estimated, each once, and dense attention, for heads of another shape."""
    heads: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    granularities = {VerticalSlash: get_args(SlashGranularity), BlockSparse: ("line",), Dense: ("line",)}
    made: dict[str, Case] = {}
    for case in cases:
        kind = type(case.sizes[0].pattern)
        for granularity in granularities.get(kind, ()):
            name = f"{KIND_NAMES[kind]} {granularity}" if kind is VerticalSlash else KIND_NAMES[kind]
            made.setdefault(name, dataclasses.replace(case, name=name, slash_granularity=granularity, **heads))
    return list(made.values())


def plan(cases: Iterable[Case], lengths: Sequence[int] | None) -> list[tuple[Case, int]]:
    """Every case at every length, the shortest first; None = the lengths of each case."""
    pairs = [(case, length) for case in cases for length in (case.lengths if lengths is None else lengths)]
    return sorted(pairs, key=lambda pair: pair[1])

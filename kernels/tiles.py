"""Tile sizes: how many queries and keys one tile of work holds."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Rows and columns of one attention tile, in tokens.

    A layout is built for one TileConfig and must be read with the same one.

    Args:
      block_q: queries per tile; a multiple of ``block_kv``.
      block_kv: keys per tile; a power of two.

    Raises:
      ValueError: a size is not as above.
    """

    block_q: int = 64
    block_kv: int = 64

    def __post_init__(self) -> None:
        if self.block_kv < 1 or self.block_kv & (self.block_kv - 1):
            raise ValueError(f"block_kv={self.block_kv} must be a power of two")
        if self.block_q < 1 or self.block_q % self.block_kv:
            raise ValueError(f"block_q={self.block_q} must be a positive multiple of block_kv={self.block_kv}")

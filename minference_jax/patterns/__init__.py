"""Head patterns: how each attention head of each layer is to be sparse, as plain data (heads) and as files (files)."""

from minference_jax.patterns.files import read_patterns, write_patterns
from minference_jax.patterns.heads import (
    DEFAULT_PATTERN,
    PUBLISHED_DEFAULT,
    AShape,
    BlockSparse,
    Dense,
    HeadPattern,
    ModelPatterns,
    PatternArrays,
    PatternKind,
    ScoreDirection,
    VerticalSlash,
    uniform_patterns,
)

__all__ = [
    "DEFAULT_PATTERN",
    "PUBLISHED_DEFAULT",
    "AShape",
    "BlockSparse",
    "Dense",
    "HeadPattern",
    "ModelPatterns",
    "PatternArrays",
    "PatternKind",
    "ScoreDirection",
    "VerticalSlash",
    "read_patterns",
    "uniform_patterns",
    "write_patterns",
]

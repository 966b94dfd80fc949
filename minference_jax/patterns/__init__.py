"""Head patterns: how each attention head of each layer is to be sparse.

heads: as plain data. files: as files. registry: which of the published files is for a model, over published (the table
of them) and release (reading one from where the user has them).
"""

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
    SlashGranularity,
    VerticalSlash,
    uniform_patterns,
)
from minference_jax.patterns.registry import PatternChoice, ResolvedPatterns, choose_published, resolve_patterns

__all__ = [
    "DEFAULT_PATTERN",
    "PUBLISHED_DEFAULT",
    "AShape",
    "BlockSparse",
    "Dense",
    "HeadPattern",
    "ModelPatterns",
    "PatternArrays",
    "PatternChoice",
    "PatternKind",
    "ResolvedPatterns",
    "ScoreDirection",
    "SlashGranularity",
    "VerticalSlash",
    "choose_published",
    "read_patterns",
    "resolve_patterns",
    "uniform_patterns",
    "write_patterns",
]

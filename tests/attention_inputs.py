"""Random inputs of attention, and patterns as the arrays that it takes."""

import jax.numpy as jnp
import numpy as np

from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, PatternArrays, VerticalSlash

MIXED = (
    VerticalSlash(vertical_size=40, slash_size=110),
    AShape(sink_size=5, window_size=70),
    BlockSparse(num_blocks=3),
    Dense(),
)


def make(T=200, S=None, B=1, N=4, K=2, H=16, dtype="float32", seed=0):
    """Random q [B, T, N, H], k and v [B, S, K, H]; S is T where it is not given."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S or T, K, H), (B, S or T, K, H))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def arrays(*heads):
    """The patterns of one layer's heads, as attention takes them traced."""
    table = ModelPatterns(layers=(heads,), source="a test").arrays()
    return PatternArrays(*(jnp.asarray(x[0]) for x in table))

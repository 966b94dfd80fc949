"""A search on a small model that takes seconds: at what budget, of which candidates, on which prompts."""

import numpy as np

from minference_jax import AShape, BlockSparse, VerticalSlash, search_patterns

BUDGET = 0.7
CANDIDATES = (
    AShape(sink_size=1, window_size=4),
    VerticalSlash(vertical_size=4, slash_size=1),
    BlockSparse(num_blocks=10),
)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 256, 500).tolist(), RNG.integers(0, 256, 490).tolist()]


def search(model, **changes):
    """What `search_patterns` finds, with some of its options changed."""
    options = {"budget": BUDGET, "levels": (1.0,), "candidates": CANDIDATES}
    return search_patterns(model, PROMPTS, **(options | changes))

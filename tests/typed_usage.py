"""A user's file: the gate checks it with `mypy --strict` against the installed wheel, and a test runs it."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import minference_jax as mj


def patterns_of_a_model(folder: Path) -> mj.ModelPatterns:
    heads: Sequence[mj.HeadPattern] = (
        mj.VerticalSlash(vertical_size=30, slash_size=100),
        mj.AShape(sink_size=4, window_size=8),
        mj.BlockSparse(num_blocks=2),
        mj.Dense(),
    )
    mj.write_patterns(mj.ModelPatterns(layers=(tuple(heads),), source="a user"), folder / "patterns.json")
    patterns: mj.ModelPatterns = mj.read_patterns(folder / "patterns.json")
    patterns.check(num_layers=1, num_heads=4)
    return patterns


def attend(patterns: mj.ModelPatterns) -> jax.Array:
    q = jnp.ones((1, 16, 4, 64))
    k = jnp.ones((1, 16, 2, 64))
    pattern = mj.PatternArrays(*(sizes[0] for sizes in patterns.arrays()))
    out: jax.Array = mj.sparse_attention(q, k, k, pattern)
    dense: jax.Array = mj.dense_attention(q, k, k)
    return jnp.abs(out - dense).max()


def answer(folder: Path) -> str:
    model: mj.LanguageModel = mj.load(folder)
    assert mj.__version__
    return str(model)


def use_every_size(kind: mj.PatternKind) -> str:
    return kind.name.lower()

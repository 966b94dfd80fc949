"""Head patterns as data: their checks and the arrays that jitted functions take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pattern_contents import EVERY_KIND

from minference_jax.patterns import (
    DEFAULT_PATTERN,
    AShape,
    BlockSparse,
    Dense,
    ModelPatterns,
    PatternKind,
    VerticalSlash,
    uniform_patterns,
)


def test_arrays_hold_each_heads_sizes_and_zero_for_the_rest():
    arrays = ModelPatterns(layers=EVERY_KIND, source="test").arrays()
    assert {a.dtype for a in arrays} == {np.dtype(np.int32)}
    assert {name: a.tolist() for name, a in arrays._asdict().items()} == {
        "kind": [[PatternKind.VERTICAL_SLASH, PatternKind.DENSE], [PatternKind.A_SHAPE, PatternKind.BLOCK_SPARSE]],
        "vertical_size": [[3, 0], [0, 0]],
        "slash_size": [[4, 0], [0, 0]],
        "sink_size": [[0, 0], [1, 0]],
        "window_size": [[0, 0], [2, 0]],
        "num_blocks": [[0, 0], [0, 7]],
    }


def test_another_pattern_does_not_recompile():
    traces = []

    @jax.jit
    def total(arrays):
        traces.append(1)
        return sum(jnp.sum(a) for a in arrays)

    assert total(uniform_patterns(2, 3).arrays()) == 6 * (500 + 700)
    assert total(uniform_patterns(2, 3, AShape(sink_size=5, window_size=6)).arrays()) == 6 * (1 + 5 + 6)
    assert len(traces) == 1


def test_max_num_blocks_is_the_largest_and_zero_without_block_sparse():
    assert ModelPatterns(layers=EVERY_KIND, source="test").max_num_blocks == 7
    assert uniform_patterns(1, 1).max_num_blocks == 0


def test_default_pattern_applies_to_every_head():
    patterns = uniform_patterns(2, 3)
    assert patterns.layers == ((DEFAULT_PATTERN,) * 3,) * 2
    assert (patterns.num_layers, patterns.num_heads, patterns.scores) == (2, 3, None)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "5", None, 2**31, 10**40, float("nan")], ids=repr)
@pytest.mark.parametrize(
    ("type_", "names"),
    [
        (VerticalSlash, ("vertical_size", "slash_size")),
        (AShape, ("sink_size", "window_size")),
        (BlockSparse, ("num_blocks",)),
    ],
)
def test_a_wrong_size_is_refused_by_name(type_, names, value):
    for wrong in names:
        with pytest.raises(ValueError, match=f"^{wrong}=.* must be "):
            type_(**{name: value if name == wrong else 5 for name in names})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "one tuple per layer"),
        ({"layers": ((),)}, "one tuple per layer"),
        ({"layers": [[Dense()]]}, "one tuple per layer"),
        ({"layers": ((Dense(),), (Dense(), Dense()))}, "layer 1 has 2 heads and layer 0 has 1"),
        ({"layers": ((Dense(), "dense"),)}, "layer 0, head 1: 'dense' must be one of"),
        ({"scores": ((1.0,), (2.0,))}, "must match the patterns' 1 layers of 1 heads"),
        ({"scores": ((float("nan"),),)}, "layer 0, head 0: score=nan must be a finite number"),
        ({"scores": ((True,),)}, "layer 0, head 0: score=True must be a number"),
        ({"score_name": "recall"}, "the direction of the score, None, must be"),
        ({"score_direction": "lower_is_better"}, "the name of the score, None, must be"),
        ({"score_name": "recall", "score_direction": "up"}, "the direction of the score, 'up', must be"),
        ({"model": ""}, "model='' must be a name"),
    ],
)
def test_model_patterns_refuse_what_is_not_a_table_of_patterns(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelPatterns(**{"layers": ((Dense(),),), "source": "test", **fields})


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "place"),
    [
        (1, 2, "layer 1, head 0 is not in the model"),
        (3, 2, "layer 2, head 0 of the model has no pattern"),
        (2, 1, "layer 0, head 1 is not in the model"),
        (2, 5, "layer 0, head 2 of the model has no pattern"),
    ],
)
def test_a_mismatch_names_the_first_layer_and_head_without_a_counterpart(num_layers, num_heads, place):
    patterns = ModelPatterns(layers=EVERY_KIND, source="there.json")
    patterns.check(2, 2)
    with pytest.raises(ValueError, match=f"^there.json: .*2 layers of 2 heads.*{place}$"):
        patterns.check(num_layers, num_heads)


def test_uniform_patterns_refuse_wrong_counts_and_patterns():
    for wrong in (0, -1, True, 2.0, 10**9):
        with pytest.raises(ValueError, match=r"num_layers=.* must be"):
            uniform_patterns(wrong, 1)
        with pytest.raises(ValueError, match=r"num_heads=.* must be"):
            uniform_patterns(1, wrong)
    with pytest.raises(ValueError, match=r"^pattern: .*must be one of VerticalSlash, AShape, BlockSparse, Dense"):
        uniform_patterns(1, 1, PatternKind.DENSE)

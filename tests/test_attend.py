from dataclasses import replace

import pytest

from minference_jax.generate.attend import choose_attend, pays_from, resolve_auto
from minference_jax.implementations import IMPLEMENTATIONS
from minference_jax.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash, uniform_patterns

TRITON = next(entry for entry in IMPLEMENTATIONS if entry.name == "triton")


def auto(pattern, length, implementation=TRITON):
    patterns = uniform_patterns(2, 4, pattern)
    return resolve_auto(None, patterns=patterns, length=length, implementation=implementation)


@pytest.mark.parametrize(
    "pattern",
    [
        VerticalSlash(vertical_size=500, slash_size=700),
        AShape(sink_size=128, window_size=3968),
        BlockSparse(num_blocks=9),
    ],
)
def test_auto_is_dense_below_the_break_even_of_the_implementation(pattern):
    assert auto(pattern, TRITON.break_even - 1) == ("dense", None)
    assert auto(pattern, max(TRITON.break_even, 8 * (128 + 3968))) == ("minference", None)


def test_auto_is_dense_until_the_prompt_is_eight_times_what_the_heads_ask_for():
    large = VerticalSlash(vertical_size=1000, slash_size=6096)
    assert auto(large, 8 * 7096 - 1) == ("dense", None)
    assert auto(large, 8 * 7096) == ("minference", None)


def test_auto_is_dense_where_every_head_is():
    assert auto(Dense(), 1 << 20) == ("dense", None)


def test_auto_asks_for_longer_prompts_where_some_heads_are_dense_and_for_none_where_half_are():
    large, how = VerticalSlash(vertical_size=1000, slash_size=6096), {"implementation": TRITON}
    heads = (large, large, large, Dense()), (large, large, Dense(), Dense())
    quarter, half = (ModelPatterns(layers=(row,), source="") for row in heads)
    pays = 2 * 8 * 7096 * 3 // 4  # what an average head asks for, with half of the saving
    assert resolve_auto(None, patterns=quarter, length=pays - 1, **how) == ("dense", None)
    assert resolve_auto(None, patterns=quarter, length=pays, **how) == ("minference", None)
    assert resolve_auto(None, patterns=half, length=1 << 30, **how) == ("dense", None)


def test_the_length_from_which_sparse_pays_grows_without_a_jump_as_heads_become_dense():
    small = VerticalSlash(vertical_size=1, slash_size=1)  # so that the implementation's break-even counts
    found = []
    for dense in range(513):
        patterns = ModelPatterns(layers=((small,) * (1024 - dense) + (Dense(),) * dense,), source="")
        found.append(pays_from(patterns, TRITON))
    assert found[0] == TRITON.break_even
    assert found[256] == 2 * TRITON.break_even
    assert found[511] == 512 * TRITON.break_even
    assert found[512] is None
    assert found[:512] == sorted(found[:512])


def test_auto_judges_the_patterns_that_the_call_brings():
    own, other = (uniform_patterns(2, 4, VerticalSlash(vertical_size=30, slash_size=n)) for n in (100, 100_000))
    resolve = {"patterns": own, "length": TRITON.break_even, "implementation": TRITON}
    assert resolve_auto(own, **resolve) == ("minference", own)
    assert resolve_auto(other, **resolve) == ("dense", None)


def test_auto_takes_patterns_of_a_model_and_of_no_single_kind():
    with pytest.raises(ValueError, match="attention='auto' takes ModelPatterns or None, got VerticalSlash"):
        resolve_auto(VerticalSlash(vertical_size=1, slash_size=1), patterns=None, length=1, implementation=TRITON)


@pytest.mark.parametrize("made_for", ["line", "block", None])
def test_patterns_run_with_the_granularity_that_they_were_searched_for(made_for):
    patterns = replace(uniform_patterns(1, 2), slash_granularity=made_for, source="found.json")
    for asked in ("line", "block"):
        how = {"slash_granularity": asked, "implementation": None, "tiles": None}
        if made_for in (None, asked):
            assert choose_attend("minference", None, patterns=patterns, **how)[0].slash_granularity == asked
        else:
            sentence = (
                f"found.json: patterns were searched for slash_granularity='{made_for}', the call asks for '{asked}'"
            )
            with pytest.raises(ValueError, match=sentence):
                choose_attend("minference", None, patterns=patterns, **how)
        assert choose_attend("dense", None, patterns=patterns, **how)[1] is None


def test_capacities_follow_the_largest_heads():
    how = {"slash_granularity": "line", "implementation": None, "tiles": None}
    few, many, blocks = (
        choose_attend("minference", None, patterns=uniform_patterns(1, 2, pattern), **how)[0].capacities
        for pattern in (
            AShape(sink_size=3, window_size=9),
            VerticalSlash(vertical_size=3500, slash_size=1),
            BlockSparse(num_blocks=300),
        )
    )
    assert few.num_columns < many.num_columns >= 3500
    assert few.num_blocks == many.num_blocks == 0
    assert blocks.num_blocks >= 300

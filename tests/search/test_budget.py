"""Candidates at the budget: never above it, as near as their sizes let them be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minference_jax import AShape, BlockSparse, Dense, VerticalSlash
from minference_jax.search import DEFAULT_CANDIDATES
from minference_jax.search.budget import equalise
from minference_jax.search.candidates import check_candidates, head_patterns, limits_of, scaled

SIZE = 8192
KINDS = [AShape(sink_size=1024, window_size=4096), VerticalSlash(vertical_size=500, slash_size=1500)]


def keys_asked(sizes):
    """A cost without jumps: the share of the prompt that a head asks for."""
    tokens = sizes.vertical_size + sizes.slash_size + sizes.sink_size + sizes.window_size + 64 * sizes.num_blocks
    return tokens / SIZE


@settings(max_examples=60)
@given(candidate=st.sampled_from(DEFAULT_CANDIDATES), budgets=st.lists(st.floats(0.05, 0.9), min_size=1, max_size=5))
def test_every_head_costs_its_own_budget_and_never_more(candidate, budgets):
    budget = np.array(budgets)
    found = equalise(candidate, keys_asked, budget, size=SIZE, tolerance=0.02)
    np.testing.assert_array_equal(found.cost, keys_asked(found.sizes))
    assert found.is_within.all()
    assert (found.cost <= budget).all()
    step = 64 / SIZE if isinstance(candidate, BlockSparse) else 3 / SIZE
    assert (found.cost >= 0.98 * budget - step).all()


@pytest.mark.parametrize("candidate", KINDS)
def test_proportions_stay(candidate):
    found = equalise(candidate, keys_asked, np.array([0.2, 0.5]), size=SIZE, tolerance=0.02)
    for pattern in head_patterns(candidate, found.sizes):
        first, second = vars(pattern).values()
        wanted, beside = vars(candidate).values()
        assert first / second == pytest.approx(wanted / beside, rel=0.02)


def test_what_a_jump_of_slashes_leaves_goes_to_the_verticals():
    def cost(sizes):  # slashes in steps of 1000, as tiles make them
        return (np.ceil(sizes.slash_size / 1000) * 1000 + sizes.vertical_size) / SIZE

    candidate = VerticalSlash(vertical_size=100, slash_size=1000)
    found = equalise(candidate, cost, np.array([3900 / SIZE]), size=SIZE, tolerance=0.01)
    (pattern,) = head_patterns(candidate, found.sizes)
    assert pattern.slash_size <= 3000
    assert pattern.vertical_size > 800
    assert 0.99 * 3900 / SIZE <= found.cost[0] <= 3900 / SIZE


def test_a_head_whose_least_sizes_cost_more_is_marked():
    found = equalise(KINDS[1], keys_asked, np.array([0.001, 0.3]), size=SIZE, tolerance=0.02)
    assert found.is_within.tolist() == [False, True]


def test_sizes_stay_where_they_mean_something():
    candidate = VerticalSlash(vertical_size=30, slash_size=2048)
    assert limits_of(candidate, SIZE) == {"vertical_size": (30, SIZE), "slash_size": (50, SIZE)}
    sizes = scaled(candidate, np.array([1e-6, 1e6]), SIZE)
    assert head_patterns(candidate, sizes) == (
        VerticalSlash(vertical_size=30, slash_size=50),
        VerticalSlash(vertical_size=SIZE, slash_size=SIZE),
    )
    assert head_patterns(BlockSparse(num_blocks=7), scaled(BlockSparse(num_blocks=7), np.array([1e6]), 100)) == (
        BlockSparse(num_blocks=2),
    )


@pytest.mark.parametrize(
    ("candidates", "sentence"),
    [
        ([], "at least one candidate is needed"),
        ([Dense()], "must be a VerticalSlash, an AShape or a BlockSparse"),
        (["a_shape"], "must be a VerticalSlash, an AShape or a BlockSparse"),
        ([KINDS[0], KINDS[1], KINDS[0]], "is given twice"),
        ([KINDS[0], AShape(sink_size=1, window_size=4)], "has the proportions of AShape.sink_size=1024"),
        ([BlockSparse(num_blocks=7), BlockSparse(num_blocks=8)], "has the proportions of BlockSparse"),
    ],
)
def test_candidates_that_can_not_be_compared_are_refused(candidates, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_candidates(candidates)

"""Which results are chosen within the budget, from made-up errors and costs."""

import pytest
from searching import CANDIDATES

from minference_jax.search.results import CandidateResult, LayerResult, check_affordable, choose


def result(candidate, errors, costs=None):
    costs = tuple(None if error is None else 0.5 for error in errors) if costs is None else costs
    patterns = tuple(None if error is None else candidate for error in errors)
    return CandidateResult(candidate, 0.5, patterns, costs, costs, errors)


def test_of_equal_errors_the_first_candidate_wins_and_heads_choose_for_themselves():
    results = result(CANDIDATES[0], (0.5, 0.2, None)), result(CANDIDATES[1], (0.5, 0.1, 0.3))
    (chosen,) = choose([LayerResult(3, results, (1.0,) * 3)], 0.5)
    assert [one.candidate for one in chosen] == [CANDIDATES[0], CANDIDATES[1], CANDIDATES[1]]


def test_with_several_levels_heads_that_gain_most_get_most_and_the_mean_keeps_the_budget():
    def layer(index, cheap, dear):
        results = [result(CANDIDATES[0], errors, (cost,) * 2) for errors, cost in ((cheap, 0.2), (dear, 0.6))]
        return LayerResult(index, tuple(results), (1.0,) * 2)

    layers = [layer(0, (0.5, 0.1), (0.1, 0.09)), layer(1, (0.4, 0.2), (0.39, 0.19))]
    costs = [[one.cost[head] for head, one in enumerate(row)] for row in choose(layers, 0.3)]
    assert costs == [[0.6, 0.2], [0.2, 0.2]]
    assert {one.cost[0] for row in choose(layers, 0.6) for one in row} == {0.6}
    with pytest.raises(ValueError, match=r"the cheapest results cost 0.200 in the mean, more than budget=0.1: give"):
        choose(layers, 0.1)
    check_affordable(layers, 0.1, num_layers=4)
    with pytest.raises(ValueError, match="2 of 3 layers: the cheapest results cost 0"):
        check_affordable(layers, 0.1, num_layers=3)


def test_a_head_that_makes_more_of_the_layers_output_gets_more():
    """Both heads gain as much of their own output; that of the second is ten times the first's."""
    results = [result(CANDIDATES[0], (error,) * 2, (cost,) * 2) for error, cost in ((0.5, 0.2), (0.1, 0.6))]
    for norms, costs in (((1.0, 10.0), [0.2, 0.6]), ((10.0, 1.0), [0.6, 0.2]), ((0.0, 1.0), [0.2, 0.6])):
        (chosen,) = choose([LayerResult(0, tuple(results), norms)], 0.4)
        assert [one.cost[head] for head, one in enumerate(chosen)] == costs

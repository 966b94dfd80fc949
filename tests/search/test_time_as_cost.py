"""The search with time as cost, told by a clock of our own making."""

import numpy as np
import pytest
from searching import BUDGET, CANDIDATES, PROMPTS, search
from small_models import NUM_HEADS, NUM_LAYERS

from minference_jax import AShape, Dense, PatternKind
from minference_jax.analysis import head_densities
from minference_jax.search import compare

pytestmark = pytest.mark.usefixtures("oracle_first")


@pytest.fixture
def timer(monkeypatch):
    """A clock that makes dense attention take 1 ms a head and sparse `factor` ms for all tiles; counts dense calls."""
    counts = {"dense": 0, "factor": 1.5}

    def dense(layer):
        counts["dense"] += 1
        return float(NUM_HEADS)

    def sparse(layer, sizes, settings):
        return counts["factor"] * np.asarray(head_densities(layer, sizes, settings), np.float64)

    monkeypatch.setattr(compare, "dense_milliseconds", dense)
    monkeypatch.setattr(compare, "head_milliseconds", sparse)
    return counts


def test_time_as_cost_is_measured_and_moves_the_tiles(model, found, timer):
    """Heads are said to take half as long again as their tiles: fewer tiles fit."""
    by_time = search(model, cost="time", candidates=CANDIDATES[:2])
    assert timer["dense"] == NUM_LAYERS * len(PROMPTS)
    for timed, counted in zip(by_time.layers, found.layers, strict=True):
        for one, other in zip(timed.candidates, counted.candidates[:2], strict=True):
            within = [cost is not None for cost in one.cost]  # some heads' least slashes take longer
            cost, density, by_tiles = (np.array(x)[within] for x in (one.cost, one.density, other.density))
            np.testing.assert_allclose(cost.astype(float), 1.5 * density.astype(float), rtol=1e-6)
            assert (cost <= (1 + compare.TOLERANCE) * BUDGET).all()
            assert (density < by_tiles).all()
        assert None not in timed.candidates[0].cost
    assert by_time.patterns.source.startswith("search at 0.7 of dense attention's time")


def test_a_time_a_little_above_the_budget_is_within_it_and_one_further_above_is_not(model, timer, monkeypatch):
    for cost, fits in (((1 + compare.TOLERANCE) * BUDGET, True), (1.1 * BUDGET, False)):
        monkeypatch.setattr(compare, "head_milliseconds", lambda *_, ms=cost: np.array([ms] + [BUDGET] * 3))
        run = {"cost": "time", "candidates": CANDIDATES[:1]}
        if fits:
            chosen = search(model, **run).chosen
            assert {one.cost[0] for (one, *_) in chosen} == {cost}
        else:
            with pytest.raises(ValueError, match="layer 0, head 0: sparse takes longer than the budget at this length"):
                search(model, **run)


def test_a_dense_head_costs_the_time_that_it_is_measured_to_take(model, timer, tmp_path):
    """Said to take half as long again as dense attention's share: what it costs is no more than that."""
    timer["factor"] = 1.5
    run = {"cost": "time", "candidates": CANDIDATES[:1], "dense_heads": True, "journal": tmp_path / "journal"}
    found = search(model, **run)
    for layer in found.layers:
        dense = layer.candidates[-1]
        assert (dense.candidate, dense.error, dense.density) == (Dense(), (0.0,) * NUM_HEADS, (1.0,) * NUM_HEADS)
        np.testing.assert_allclose(dense.cost, 1.5, rtol=1e-6)
    timer["factor"] = 100.0
    assert search(model, **run) == found  # from the journal, not measured anew
    lines = (tmp_path / "journal").read_text().replace('"patterns": [{"kind": "dense"}', '"patterns": [null')
    (tmp_path / "journal").write_text(lines)
    with pytest.raises(ValueError, match=r"line 2: patterns=.* must be a list of 4 entries, each an object$"):
        search(model, **run)


def test_where_nothing_sparse_fits_a_head_it_may_stay_dense(model, monkeypatch):
    """By time: the first head of each layer is said to take longer than any budget, unless it is dense."""

    def slow(layer, sizes, settings):
        is_dense = np.asarray(sizes.kind) == PatternKind.DENSE
        return np.where(is_dense, 1.0, np.array([9.0, 0.3, 0.3, 0.3]))

    monkeypatch.setattr(compare, "dense_milliseconds", lambda layer: float(NUM_HEADS))
    monkeypatch.setattr(compare, "head_milliseconds", slow)
    run = {"cost": "time", "candidates": CANDIDATES[:1], "budget": 0.5}
    with pytest.raises(ValueError, match="layer 0, head 0: sparse takes longer"):
        search(model, **run, dense_heads=False)
    found = search(model, **run, dense_heads=True)
    kinds = [[type(head) for head in row] for row in found.patterns.layers]
    assert kinds == [[Dense, AShape, AShape, AShape]] * NUM_LAYERS
    with pytest.raises(ValueError, match=r"1 of 2 layers: the cheapest results cost 0.475 in the mean, more than"):
        search(model, **(run | {"budget": 0.2}), dense_heads=True, levels=(1.0, 2.0))


def test_where_sparse_is_slower_than_dense_the_first_layer_says_so(model, timer):
    timer["factor"] = 100.0
    with pytest.raises(ValueError, match=r"at 500 tokens the fastest candidate takes [\d.]+ of dense attention's time"):
        search(model, cost="time", candidates=CANDIDATES[1:2])
    assert timer["dense"] == len(PROMPTS)

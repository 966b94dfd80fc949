"""The search on a small model: what it finds is what runs, it goes on where it stopped, and it keeps its answer."""

import json
import re
import weakref
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import NUM_HEADS, NUM_LAYERS, write_model

from minference_jax import (
    AShape,
    BlockSparse,
    Dense,
    PatternKind,
    VerticalSlash,
    calibration_prompts,
    load,
    read_patterns,
    search_patterns,
    write_patterns,
)
from minference_jax.analysis import (
    LayerActivations,
    activation_bytes,
    head_densities,
    head_errors,
    read_layers,
    settings_for,
)
from minference_jax.attention import dense_attention
from minference_jax.kernels import reference
from minference_jax.search import compare, manual_prompt, retrieval_prompt
from minference_jax.search.compare import Comparison
from minference_jax.search.results import CandidateResult, LayerResult, check_affordable, choose

BUDGET = 0.7
CANDIDATES = (
    AShape(sink_size=1, window_size=4),
    VerticalSlash(vertical_size=4, slash_size=1),
    BlockSparse(num_blocks=10),
)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 256, 500).tolist(), RNG.integers(0, 256, 490).tolist()]
pytestmark = pytest.mark.usefixtures("oracle_first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "hf")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def search(model, **changes):
    options = {"budget": BUDGET, "levels": (1.0,), "candidates": CANDIDATES}
    return search_patterns(model, PROMPTS, **(options | changes))


@pytest.fixture(scope="module")
def found(model):
    return search(model)


def test_every_candidate_of_every_head_costs_the_budget_at_most(found):
    assert [layer.layer for layer in found.layers] == list(range(NUM_LAYERS))
    for layer in found.layers:
        assert [one.candidate for one in layer.candidates] == list(CANDIDATES)
        for one in layer.candidates:
            assert len(one.patterns) == NUM_HEADS
            assert all(type(pattern) is type(one.candidate) for pattern in one.patterns)
            assert one.cost == one.density  # the tiles, by default
            assert max(one.cost) <= BUDGET
            assert min(one.cost) > 0.8 * BUDGET


def test_the_answer_is_the_candidate_of_least_error_exactly_as_it_was_compared(found):
    assert (found.patterns.score_name, found.patterns.score_direction) == ("relative_output_error", "lower_is_better")
    for index, layer in enumerate(found.layers):
        for head in range(NUM_HEADS):
            best = min(layer.candidates, key=lambda one: one.error[head])
            assert found.patterns.layers[index][head] == best.patterns[head]
            assert found.patterns.scores[index][head] == best.error[head]


def test_what_runs_costs_what_the_search_said(model, found):
    heads = [one.density[head] for head, one in enumerate(choose(found.layers[:1], BUDGET)[0])]
    ran = [np.asarray(model.prefill(prompt, pattern=found.patterns).density)[0, 0] for prompt in PROMPTS]
    np.testing.assert_allclose(np.mean(ran, axis=0), heads, rtol=1e-6)  # layer 0 reads the same in both


def test_errors_are_those_of_the_oracle(model, found):
    """Masked attention with the whole matrix in memory, on the second layer's activations, of an A-shape."""
    layers = list(read_layers(model, PROMPTS))[1]
    result = found.layers[1].candidates[0]
    wrong, whole = np.zeros(NUM_HEADS), np.zeros(NUM_HEADS)
    for x in layers:
        length = int(x.kv_len[0])
        q, k, v = (array[:, :length] for array in (x.q, x.k, x.v))
        i, j = np.mgrid[:length, :length]
        shapes = [((i - j < p.window_size) | (j < p.sink_size)) & (j <= i) for p in result.patterns]
        masks = [jnp.asarray(np.stack(rows))[None] for rows in (shapes, [j <= i] * NUM_HEADS)]
        out, dense = (np.asarray(reference.attention(q, k, v, mask, scale=8**-0.5)[0], np.float64) for mask in masks)
        weight = np.full(length, 0.5 / length) + 0.5 / 64 * (np.arange(length) >= length - 64)
        wrong += np.einsum("t,btnh->n", weight, np.square(out - dense))
        whole += np.einsum("t,btnh->n", weight, np.square(dense))
    np.testing.assert_allclose(result.error, np.sqrt(wrong / whole), rtol=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_the_last_queries_that_is_none_is_refused(share):
    out = jnp.ones((1, 128, 2, 8))
    with pytest.raises(ValueError, match=r"last_share=.* must be from 0 to 1"):
        head_errors(out, out, jnp.array([100]), last_share=share)


def test_the_bytes_that_are_said_are_those_that_are_held(model):
    layers = read_layers(model, PROMPTS, return_lse=True)
    layer = next(layers)
    hidden = sum(one.q.shape[1] * model.config.hidden_size * 4 for one in layer)
    held = sum(x.nbytes for one in layer for x in (one.q, one.k, one.v, one.out, one.lse))
    assert activation_bytes(model, [len(prompt) for prompt in PROMPTS], return_lse=True) == hidden + held


def test_a_layer_is_let_go_of_before_the_next_is_read(model, monkeypatch):
    seen, alive = [], []

    def comparing(self, index, activations, told):
        alive.append(sum(one() is not None for one in seen))
        seen.extend(weakref.ref(one.q) for one in activations)
        return real(self, index, activations, told)

    real = Comparison.layer
    monkeypatch.setattr(Comparison, "layer", comparing)
    search(model, candidates=CANDIDATES[:1])
    assert alive == [0] * NUM_LAYERS


def planted():
    """Four heads of known structure: two attend 300 tokens back, two to a block of 64 keys that is each tile's own."""
    length, size = 512, 8
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((length, size))
    directions *= 30 / np.linalg.norm(directions, axis=1, keepdims=True)
    blocks, tile = 30 * np.eye(size), np.arange(length) // 64
    q, k = np.zeros((1, length, 4, size)), np.zeros((1, length, 2, size))
    k[0, :-300, 0], k[0, -300:, 0] = directions[300:], directions[:300]
    q[0, :, :2] = np.concatenate([k[0, :300, 0], directions[300:]])[:, None]  # the first ones have nothing so far back
    q[0, :, 2:], k[0, :, 1] = blocks[np.array([0, 0, 1, 0, 2, 1, 3, 2])[tile]][:, None], blocks[tile]
    v = rng.standard_normal((1, length, 2, size))
    # On a device that is named, as a model's weights are: programs are shared with the other tests.
    q, k, v = (jax.device_put(x.astype(np.float32), jax.devices()[0]) for x in (q, k, v))
    kv_len = jax.device_put(np.array([length], np.int32), jax.devices()[0])
    return LayerActivations(q, k, v, dense_attention(q, k, v), None, kv_len)


def test_heads_of_known_structure_get_the_pattern_that_fits(model):
    candidates = (CANDIDATES[0], VerticalSlash(vertical_size=30, slash_size=400), CANDIDATES[2])
    how = {"budget": 0.8, "budgets": (0.8,), "dense_heads": False, "cost": "tiles", "size": 512}
    run = Comparison(candidates=candidates, settings=settings_for(model), **how)
    layer = run.layer(0, [planted()])
    assert [type(one.candidate) for one in choose([layer], 0.8)[0]] == [VerticalSlash] * 2 + [BlockSparse] * 2
    errors = np.array([one.error for one in layer.candidates])
    assert errors[1, 0] < 0.2 * np.delete(errors[:, 0], 1).min()


class _Interrupted(Exception):
    pass


def interrupted(layer):
    raise _Interrupted


def test_an_interrupted_search_goes_on_behind_the_last_finished_layer(model, found, tmp_path):
    journal, searched = tmp_path / "journal", []
    journal.touch()  # it was killed before it wrote anything
    with pytest.raises(_Interrupted):
        search(model, journal=journal, finished=interrupted)
    with journal.open("a") as file:  # the next line was being written
        file.write('{"layer": 1, "candid')
    again = search(model, journal=journal, finished=lambda layer: searched.append(layer.layer))
    assert searched == [1]
    assert again == found
    assert search(model, journal=journal, finished=interrupted) == found  # nothing is left to do
    assert len(journal.read_text().splitlines()) == 1 + NUM_LAYERS


@pytest.fixture
def journal(model, tmp_path):
    """That of a search that was interrupted behind its first layer."""
    path = tmp_path / "journal"
    with pytest.raises(_Interrupted):
        search(model, journal=path, finished=interrupted, candidates=CANDIDATES[:1])
    return path


def with_fields(*place, **changes):
    """What changes a field of a line, or of its first result."""

    def change(fields):
        inner = fields
        for one in place:
            inner = inner[one]
        inner |= changes
        return fields

    return change


RESULT = ("candidates", 0)


@pytest.mark.parametrize(
    ("line", "change", "sentence"),
    [
        (0, "[1]", 'without "format": "minference-jax/search" in its first line it is not the journal of a search'),
        (0, '{"format": "other"}', 'without "format": "minference-jax/search" in its first line'),
        (0, with_fields(version=3), "version 3 needs a newer minference-jax"),
        (0, with_fields(version=1), "version 1 is of an older minference-jax, this one goes on with 2 only: remove it"),
        (1, '{"layer": 0, "candidates": [{}]}', "line 2: missing field 'output_norms'"),
        (1, with_fields(more=1), "line 2: unknown field 'more'"),
        (1, with_fields(layer=7), "line 2: layer=7 must be 0"),
        (1, "{", "line 2: not JSON"),
        (1, with_fields(output_norms=[1.0]), "line 2: output_norms=[1.0] must be a list of 4 entries, each a finite"),
        (1, with_fields(output_norms="a"), "line 2: output_norms='a' must be a list"),
        (1, with_fields(candidates=[]), "line 2: it has 0 results, the settings ask for 1"),
        (1, with_fields(*RESULT, budget=0.5), "line 2: budget=0.5 stands where the settings have 0.7"),
        (1, with_fields(*RESULT, candidate={"kind": "dense"}), "line 2: candidate={'kind': 'dense'} stands where"),
        (
            1,
            with_fields(*RESULT, cost=[None] * 4),
            "line 2: cost must be null where there is no pattern, and nowhere else",
        ),
        (
            1,
            with_fields(*RESULT, error=[-0.1] * 4),
            "line 2: error=[-0.1, -0.1, -0.1, -0.1] must be a list",
        ),
        (1, with_fields(*RESULT, cost=[-1] * 4), "each a finite number of at least 0 or null"),
        (1, with_fields(*RESULT, density=[-1] * 4), "line 2: density=[-1, -1, -1, -1] must be"),
        (1, with_fields(output_norms=[-1.0] * 4), "line 2: output_norms=[-1.0, -1.0, -1.0, -1.0] must be"),
        (1, with_fields(*RESULT, error=["x"] * 4), "line 2: error=['x', 'x', 'x', 'x'] must be a list of 4 entries"),
        (
            1,
            with_fields(*RESULT, patterns=[{"kind": "a_shape"}] * 4),
            "line 2: missing field 'sink_size', 'window_size'",
        ),
        (1, with_fields(*RESULT, "patterns", 0, kind="dense"), "line 2: kind='dense' must be 'a_shape'"),
        (1, with_fields(*RESULT, "patterns", 0, sink_size=0), "line 2: sink_size=0 must be from 1 to"),
        (1, '{"layer": 0, "candidates": [], "output_norms": [NaN]}', "line 2: not JSON: NaN is no number"),
    ],
)
def test_a_damaged_or_foreign_journal_is_refused_in_a_sentence(model, journal, line, change, sentence):
    lines = journal.read_text().splitlines()
    lines[line] = change if isinstance(change, str) else json.dumps(change(json.loads(lines[line])))
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"journal: .*{re.escape(sentence)}"):
        search(model, journal=journal, candidates=CANDIDATES[:1])


def test_a_layer_more_than_the_model_has_is_refused(model, journal):
    head, layer = (json.loads(line) for line in journal.read_text().splitlines())
    lines = [head, *(layer | {"layer": index} for index in range(NUM_LAYERS + 1))]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="line 4: the model has 2 layers, and this is one more"):
        search(model, journal=journal, candidates=CANDIDATES[:1])


def test_a_journal_of_another_search_or_of_other_weights_is_refused(model, journal, monkeypatch):
    with pytest.raises(ValueError, match=r"a search with other settings \(budgets\[0\]: 0.7 there, 0.6 here\): remove"):
        search(model, journal=journal, candidates=CANDIDATES[:1], budget=0.6)
    with monkeypatch.context() as patched:
        patched.setattr(model, "_state", jax.tree.map(lambda x: x + 0.5, model._state))
        with pytest.raises(ValueError, match=r"other settings \(weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here\)"):
            search(model, journal=journal, candidates=CANDIDATES[:1])
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["output_norms"][0] *= 1.5
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="layer 0 gives other outputs than when the search began"):
        search(model, journal=journal, candidates=CANDIDATES[:1])


def test_answers_are_written_as_they_are_in_both_formats(found, tmp_path):
    write_patterns(found.patterns, tmp_path / "ours.json")
    ours = read_patterns(tmp_path / "ours.json")
    assert ours == found.patterns
    assert ours.slash_granularity == "line"
    assert ours.source.endswith("ours.json (search at 0.7 of dense attention's tiles on 2 prompts of up to 500 tokens)")
    write_patterns(found.patterns, tmp_path / "published.json", format="published")
    published = read_patterns(tmp_path / "published.json")
    assert (published.layers, published.scores) == (found.patterns.layers, found.patterns.scores)


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


def test_without_levels_those_that_are_less_than_dense_are_compared(model):
    for budget, levels in ((0.6, (0.5, 1)), (0.4, (0.5, 1, 2))):
        found = search_patterns(model, PROMPTS[:1], budget=budget, candidates=CANDIDATES[:1])
        assert [one.budget for one in found.layers[0].candidates[:-1]] == [budget * level for level in levels]
        cost = [one.cost[head] for row in found.chosen for head, one in enumerate(row)]
        assert np.mean(cost) <= budget


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": 0}, "budget=0 must be above 0 and below 1"),
        ({"budget": 1.0}, "budget=1.0 must be above 0 and below 1"),
        ({"budget": float("nan")}, "must be above 0 and below 1"),
        ({"levels": ()}, "must be different multiples of budget=0.7"),
        ({"levels": (1, 2)}, "each above 0 and below 1"),
        ({"levels": (1.1, 1.2)}, r"levels=\[1.1, 1.2\] must begin at 1 or less"),
        ({"levels": (1, 1)}, "must be different multiples"),
        ({"levels": "12"}, r"levels=\['1', '2'\] must be numbers"),
        ({"levels": 2.0}, r"levels=\[2.0\] must be different multiples"),
        ({"budget": "0.3"}, "budget='0.3' must be above 0"),
        ({"dense_heads": 1}, "dense_heads=1 must be True, False or None"),
        ({"dense_heads": "no"}, "dense_heads='no' must be True, False or None"),
        ({"name": ""}, "name='' must be the name of a model or None"),
        ({"candidates": 3}, "candidate 3 must be a VerticalSlash"),
        ({"cost": "flops"}, 'must be "tiles" or "time"'),
        ({"candidates": ()}, "at least one candidate is needed"),
        ({"candidates": (Dense(),)}, "must be a VerticalSlash"),
        ({"slash_granularity": "dot"}, 'must be "line" or "block"'),
        ({"implementation": "abacus"}, "is not one of"),
        ({"budget": 0.1, "candidates": CANDIDATES[1:2]}, "budget of 0.1, at its least sizes [0-9.]+ of .*A-shape"),
        (
            {"budget": 1e-9, "levels": (1.0, 2.0), "dense_heads": False},
            r"more than the budget of 1e-09 \(2e-09 at its largest level\), at its least",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(model, **changes)


def test_numbers_of_numpy_and_levels_of_a_generator_are_taken(model):
    found = search(model, candidates=CANDIDATES[:1], budget=np.float32(0.5), levels=(x for x in (0.8, 1.0)))
    assert [one.budget for one in found.layers[0].candidates] == [0.4, 0.5, 1.0]


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "at least one prompt is needed"),
        ([[1], []], "prompt 1 must be a list of at least one token id"),
        ([[1] * 600], "prompt 0 has 600 tokens, the model can read 512"),
        ([[999]], "prompt 0 has token ids from 999"),
        ([[1.5]], "prompt 0 must be integer token ids, got float64"),
        ([1, 2, 3], "prompt 0 must be a list of token ids, got 1"),
        (["text"], "prompt 0 must be a list of token ids, got 'text'"),
    ],
)
def test_prompts_that_the_model_can_not_read_are_refused(model, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        search_patterns(model, prompts)


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


def test_levels_are_searched_and_shared_out_over_all_layers(model):
    candidates = CANDIDATES[:1]
    levels = search(model, candidates=candidates, levels=(0.8, 1.2))
    chosen = choose(levels.layers, BUDGET)
    cost = np.array([[one.cost[head] for head, one in enumerate(row)] for row in chosen])
    assert cost.mean() <= BUDGET
    assert cost.max() > BUDGET
    assert levels.patterns.layers == tuple(tuple(one.patterns[h] for h, one in enumerate(row)) for row in chosen)
    assert len(levels.layers[0].candidates) == 3  # dense attention is one


def test_heads_that_need_it_stay_dense_where_they_may(model):
    candidates, levels = CANDIDATES[:1], (0.8, 1.2)
    without, free = (search(model, candidates=candidates, levels=levels, dense_heads=may) for may in (False, None))
    kinds = [{type(head) for row in found.patterns.layers for head in row} for found in (without, free)]
    assert kinds == [{AShape}, {AShape, Dense}]
    costs = [[one.cost[head] for row in found.chosen for head, one in enumerate(row)] for found in (without, free)]
    assert max(map(np.mean, costs)) <= BUDGET
    for layer in free.layers:
        dense = layer.candidates[-1]
        assert (dense.candidate, dense.cost, dense.error) == (Dense(), (1.0,) * NUM_HEADS, (0.0,) * NUM_HEADS)
    losses = [
        sum(
            (one.error[head] * layer.output_norms[head]) ** 2 / np.square(layer.output_norms).sum()
            for layer, row in zip(found.layers, found.chosen, strict=True)
            for head, one in enumerate(row)
        )
        for found in (without, free)
    ]
    assert losses[1] < losses[0]
    dense = np.array([[isinstance(head, Dense) for head in row] for row in free.patterns.layers])
    ran = np.mean([np.asarray(model.prefill(one, pattern=free.patterns).density)[:, 0] for one in PROMPTS], axis=0)
    np.testing.assert_array_equal(ran[dense], 1.0)
    assert ran.mean() <= BUDGET


def test_generated_prompts_fill_the_length_and_ask_for_what_is_there(model):
    retrieval, manual, another, _ = calibration_prompts(model, 400, count=4)
    for prompt in (retrieval, manual):
        assert 400 - 100 < len(prompt) <= 400
    text = model.tokenizer.decode(retrieval)
    object_ = json.loads(text[text.index("{") : text.index("}") + 1])
    key = text.rpartition('the key "')[2].partition('"')[0]
    assert key in object_
    text, _, question = model.tokenizer.decode(manual).rpartition("\n\n")
    topic = question.partition("about ")[2].partition(",")[0]
    assert topics[topic].splitlines()[1] in text
    assert len(re.findall(r"\nThe number of this manual is \d{7}\.\n", text)) == 1
    assert question.startswith("What does")
    assert "what is the number of this manual?" in question
    assert calibration_prompts(model, 400) == [retrieval, manual]
    assert calibration_prompts(model, 400, count=1, seed=1) == [another] != [retrieval]
    assert max(map(len, calibration_prompts(model))) <= model.config.max_length
    for prompt_of in (retrieval_prompt, manual_prompt):
        with pytest.raises(ValueError, match="longer than the 512 that the model can read"):
            prompt_of(model, 513)
        with pytest.raises(ValueError, match="a calibration prompt: length=20 is too short"):
            prompt_of(model, 20)
    with pytest.raises(ValueError, match="count=0 must be 1 or more"):
        calibration_prompts(model, count=0)

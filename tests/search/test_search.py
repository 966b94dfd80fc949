"""The search on a small model: what it finds is what runs, as it was compared, and heads get what fits them."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searching import BUDGET, CANDIDATES, PROMPTS, search
from small_models import NUM_HEADS, NUM_LAYERS

from minference_jax import AShape, BlockSparse, Dense, VerticalSlash, read_patterns, search_patterns, write_patterns
from minference_jax.analysis import LayerActivations, read_layers, settings_for
from minference_jax.attention import dense_attention
from minference_jax.kernels import reference
from minference_jax.search.compare import Comparison
from minference_jax.search.results import choose

pytestmark = pytest.mark.usefixtures("oracle_first")


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


def test_answers_are_written_as_they_are_in_both_formats(found, tmp_path):
    write_patterns(found.patterns, tmp_path / "ours.json")
    ours = read_patterns(tmp_path / "ours.json")
    assert ours == found.patterns
    assert ours.slash_granularity == "line"
    assert ours.source.endswith("ours.json (search at 0.7 of dense attention's tiles on 2 prompts of up to 500 tokens)")
    write_patterns(found.patterns, tmp_path / "published.json", format="published")
    published = read_patterns(tmp_path / "published.json")
    assert (published.layers, published.scores) == (found.patterns.layers, found.patterns.scores)


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

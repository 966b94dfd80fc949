"""Constructed lists in whole prefills: they are of the stated kind, and the estimate runs but chooses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import write_model

from minference_jax import VerticalSlash, load
from minference_jax.bench.constructed import ConstructedAttend, _Mass
from minference_jax.bench.prefill import PrefillBench, Subject
from minference_jax.generate.attend import choose_attend
from minference_jax.measure import attention_of

SIZE = 4096


def mass(key, positions, share=0.9):
    def real(rows, k, positions, *, scale):
        return jnp.full((1, 2, SIZE), key), jnp.full((1, 2, SIZE), key)

    return _Mass(real, share)(None, None, positions, scale=1.0)


def test_any_number_of_slashes_has_the_share_of_nearest_ones():
    keys, distances = (np.asarray(x) for x in mass(1.0, None))
    for count in (50, 400, 2000):
        for head in distances[0]:
            chosen = np.argsort(-head)[:count]
            local = int((chosen < count).sum())  # nearest ones, and what was drawn among them
            assert 0.85 * count <= local < count
            nearest = np.setdiff1d(np.arange(int(0.85 * count)), chosen)
            assert nearest.size == 0
    assert (distances[0, 0] != distances[0, 1]).any()  # each head has its own
    first = np.argsort(-keys[0, 0])[:1000]
    assert 0.4 * SIZE < first.mean() < 0.6 * SIZE


def test_the_estimate_changes_no_choice_but_is_not_left_out():
    for small, large in zip(mass(0.0, None), mass(64.0, None), strict=True):
        np.testing.assert_array_equal(small, large)
    assert all(np.isnan(x).all() for x in mass(np.nan, None))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("model")))


def bench(model, **options):
    attention = attention_of(
        "vertical_slash", {"vertical_size": 30, "slash_size": 104}, options.pop("granularity", None)
    )
    subject = Subject("small", model, model.config.num_layers, "activations", "none")
    return PrefillBench(subject, attention, repeats=1, **options)


def test_records_say_so_and_the_lists_are_other_ones(model):
    (_, sparse), (_, constructed) = (
        list(bench(model, has_parts=False, **how).measure(450)) for how in ({}, {"local_share": 0.5})
    )
    assert constructed["lists"].startswith("a construction, 50% of slashes nearest")
    assert sparse["lists"] == "activations"
    assert constructed["density"] != sparse["density"]
    assert constructed["ms"] > 0


def test_the_attention_is_that_over_the_constructed_lists(model):
    pattern = VerticalSlash(vertical_size=SIZE, slash_size=SIZE)  # all: exact, whatever the lists
    how = {"slash_granularity": "line", "implementation": None, "tiles": None}
    attend, arrays = choose_attend("vertical_slash", pattern, patterns=model.patterns, **how)
    heads = model.config.num_heads
    q, k, v = (jax.random.normal(jax.random.key(seed), (1, 200, heads, 8)) for seed in range(3))
    where = {"scale": 0.3, "q_offset": jnp.zeros(1, jnp.int32), "kv_len": jnp.full(1, 200)}
    one = type(arrays)(*(x[0] for x in arrays))
    expected, _ = attend(q, k, v, one, **where)
    out, density = ConstructedAttend(**vars(attend), local_share=0.9)(q, k, v, one, **where)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert density.shape == (1, heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_share": 1.5}, "local_share=1.5 must be above 0 and below 1"),
        ({"local_share": 0.9, "granularity": "block"}, "they need slash_granularity='line'"),
        ({"local_share": 0.9, "kv_cache": "host"}, "kv_cache='host' goes neither with"),
    ],
)
def test_what_can_not_be_constructed_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        bench(model, **options)

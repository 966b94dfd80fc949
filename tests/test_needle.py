"""Needle in a haystack on the default model's real weights: MInference finds what dense attention finds."""

import numpy as np
import pytest
from haystack import DEPTHS, haystack, is_found

import minference_jax

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def model():
    try:
        return minference_jax.load()
    except ValueError as error:
        if "can't be downloaded" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(("length", "step"), [(2048, 2), pytest.param(4096, 3, marks=pytest.mark.slow)])
def test_minference_finds_every_needle_that_dense_finds(model, length, step, record_property):
    missed_by_both, missed_by_minference, densities = [], [], []
    for depth in range(0, len(DEPTHS), step):
        prompt, number = haystack(model, length, depth)
        assert 0.97 * length <= len(prompt) <= length
        prefilled = model.prefill(prompt, attention="minference")
        densities.append(float(np.mean(prefilled.density)))
        if not is_found(model, prefilled, number):  # dense attention is asked only where its answer matters
            found = is_found(model, model.prefill(prompt, attention="dense"), number)
            (missed_by_minference if found else missed_by_both).append(depth)
    record_property("mean_density", round(float(np.mean(densities)), 4))
    print(f"{length} tokens: {missed_by_minference=}, {missed_by_both=}, mean density {np.mean(densities):.3f}")
    assert missed_by_minference == []
    assert len(missed_by_both) <= 1

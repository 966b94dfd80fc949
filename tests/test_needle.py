"""Needle in a haystack on the default model's real weights: MInference finds what dense attention finds."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import minference_jax
from minference_jax import niah_samples

ROOT = Path(__file__).parents[1]
TEMPLATE = (ROOT / "benchmarks" / "niah_book_template.txt").read_text("utf-8")

pytestmark = [pytest.mark.network, pytest.mark.optimized]


@pytest.fixture(scope="module")
def model():
    try:
        return minference_jax.load()
    except ValueError as error:
        if "can't be downloaded" not in str(error):
            raise
        pytest.skip(str(error))


def is_found(model, prefilled, sample):
    """Whether the greedy answer names the number; decoding ends where it does."""
    answer = ""
    for piece in model.stream(prefilled, max_new_tokens=sample.max_new_tokens):
        answer += piece
        if sample.answers[0] in answer:
            return True
    return False


def test_minference_finds_every_needle_that_dense_finds(model, record_property):
    length, step = 2048, 2
    text = (ROOT / "examples" / "persuasion.txt").read_text("utf-8")
    missed_by_both, missed_by_minference, densities = [], [], []
    for sample in islice(niah_samples(model, text, [length], template=TEMPLATE), 0, None, step):
        assert 0.97 * length <= len(sample.prompt) + sample.max_new_tokens <= length
        prefilled = model.prefill(sample.prompt, attention="minference")
        densities.append(float(np.mean(prefilled.density)))
        if not is_found(model, prefilled, sample):  # dense attention is asked only where its answer matters
            found = is_found(model, model.prefill(sample.prompt, attention="dense"), sample)
            (missed_by_minference if found else missed_by_both).append(sample.about["depth"])
    record_property("mean_density", round(float(np.mean(densities)), 4))
    print(f"{length} tokens: {missed_by_minference=}, {missed_by_both=}, mean density {np.mean(densities):.3f}")
    assert missed_by_minference == []
    assert len(missed_by_both) <= 1

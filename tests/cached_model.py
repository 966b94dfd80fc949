"""A tiny model with a long context, prompts and what is asked behind them, and how far caches may be off."""

import dataclasses

import numpy as np
import pytest
from goldens import tiny_models

from minference_jax.generate import LanguageModel
from minference_jax.models import from_parameters

TOKENS = np.random.default_rng(5).integers(0, 61, 600).astype(np.int32)
PROMPTS = [TOKENS[:200], TOKENS[20:90]]
MORE = [TOKENS[200:230], TOKENS[90:95]]
DENSE = {"attention": "dense"}
CLOSE = {"rtol": 0, "atol": 2e-5}
BOUNDS = {"int8": 0.08, "fp8": 0.4}  # of logits up to 4


def of_layers(num_layers):
    """The model with so many layers."""
    config = dataclasses.replace(
        tiny_models.CASES["default_untied"], num_layers=num_layers, max_position_embeddings=1 << 17
    )
    return LanguageModel(from_parameters(config, tiny_models.tiny_parameters(config)))


@pytest.fixture(scope="module")
def model():
    return of_layers(2)


@pytest.fixture(scope="module")
def plain(model):
    """The prompts in a plain cache."""
    return model.prefill(PROMPTS, **DENSE)

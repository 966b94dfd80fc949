"""A small model, and what the search finds for it."""

import pytest
from searching import search
from small_models import write_model

from minference_jax import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("models") / "hf"))


@pytest.fixture(scope="module")
def found(model):
    return search(model)

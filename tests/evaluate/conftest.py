"""A tiny model whose tokens are bytes, with room for short benchmarks."""

import json

import pytest
from small_models import write_model

import minference_jax

CONTEXT = 2048


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder of the model."""
    path = write_model(tmp_path_factory.mktemp("evaluate") / "hf")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return path


@pytest.fixture(scope="session")
def model(folder):
    return minference_jax.load(folder)


@pytest.fixture(scope="session")
def prose():
    """Two hundred short sentences, no two alike."""
    return " ".join(f"In year {i} it rained for {i * 7 % 31} days." for i in range(200))

"""Layers one at a time: the bytes that they take, and errors of heads."""

import jax.numpy as jnp
import pytest
from searching import PROMPTS
from small_models import write_model

from minference_jax import load
from minference_jax.analysis import activation_bytes, head_errors, read_layers

pytestmark = pytest.mark.usefixtures("oracle_first")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("models") / "hf"))


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

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax.kernels import select_triton, select_xla

KERNELS = pytest.mark.parametrize(
    "top_k_mask",
    [
        select_xla.top_k_mask,
        functools.partial(select_triton.top_k_mask, interpret=True),
        pytest.param(select_triton.top_k_mask, marks=pytest.mark.gpu),
    ],
    ids=["xla", "triton interpreted", "triton"],
)


@KERNELS
@pytest.mark.parametrize("size", [1, 23, 4096, 5000])
def test_exactly_the_k_largest_are_marked_and_of_equals_the_first(top_k_mask, size):
    rng = np.random.default_rng(size)
    scores = rng.standard_normal((2, 3, size)).astype(np.float32).round(1)  # many equals
    scores[0, 0, ::3], scores[0, 1, ::2], scores[1, 1] = np.inf, -np.inf, -0.0
    k = rng.integers(0, size + 1, (2, 3))
    k[0, 2], k[1, 2] = 0, size
    got = np.asarray(top_k_mask(jnp.asarray(scores), jnp.asarray(k, jnp.int32)))
    for index in np.ndindex(2, 3):
        largest = np.argsort(-scores[index], kind="stable")[: k[index]]
        np.testing.assert_array_equal(np.flatnonzero(got[index]), np.sort(largest))

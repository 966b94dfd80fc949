"""What attention refuses in one sentence, and gives NaN for where it is traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import MIXED, arrays, make

from minference_jax import attention, implementations
from minference_jax.patterns import BlockSparse, Dense, VerticalSlash


def test_granularity_that_is_neither_is_refused():
    with pytest.raises(ValueError, match='slash_granularity=\'tile\' must be "line" or "block"'):
        attention.vertical_slash_attention(*make(T=10), slash_granularity="tile")


def test_more_verticals_than_the_capacity_are_refused_or_made_nan_where_they_are_traced():
    q, k, v = make(T=300)
    pattern = arrays(*[VerticalSlash(vertical_size=80, slash_size=60), Dense()] * 2)
    with pytest.raises(ValueError, match=r"head 0 .*vertical_size=80.* max_num_columns=64 verticals or sinks"):
        attention.sparse_attention(q, k, v, pattern, max_num_columns=64)
    out = jax.jit(functools.partial(attention.sparse_attention, max_num_columns=64))(q, k, v, pattern)
    assert np.isnan(np.asarray(out)[:, :, ::2]).all()
    assert np.isfinite(np.asarray(out)[:, :, 1::2]).all()
    enough = jax.jit(functools.partial(attention.sparse_attention, max_num_columns=80))(q, k, v, pattern)
    np.testing.assert_allclose(enough, attention.sparse_attention(q, k, v, pattern), atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tiles": (64, 64)}, r"tiles=\(64, 64\) must be a TileConfig"),
        ({"implementation": ["xla"]}, r"implementation=\['xla'\] is not one of"),
        ({"kv_len": [[1], [2, 3]]}, r"kv_len=\[\[1\], \[2, 3\]\] must be an integer or integers of shape \(1,\)"),
        ({"skip_threshold": "0.1"}, "skip_threshold='0.1' must be a Python number"),
        ({"q": [1, 2]}, "q, k and v must be arrays, not list, "),
    ],
)
def test_arguments_of_another_kind_are_refused_in_one_sentence(given, message):
    q, k, v = make(T=10)
    with pytest.raises(ValueError, match=message):
        attention.vertical_slash_attention(**{"q": q, "k": k, "v": v} | given)


def test_gradient_is_refused_in_one_sentence():
    q, k, v = make(T=10)
    for run in (attention.dense_attention, attention.vertical_slash_attention):
        with pytest.raises(NotImplementedError, match="prefill only and has no gradient"):
            jax.grad(lambda q, run=run: run(q, k, v).sum())(q)


def test_named_implementation_never_falls_back(monkeypatch):
    def decline(*args, **kwargs):
        raise NotImplementedError("not on this machine")

    entries = (implementations.Implementation("other", decline, decline, decline), *implementations.IMPLEMENTATIONS)
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", entries)
    q, k, v = make(T=33)
    assert attention.dense_attention(q, k, v).shape == q.shape  # None takes the next one
    with pytest.raises(NotImplementedError, match="not on this machine"):
        attention.dense_attention(q, k, v, implementation="other")
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", entries[:1])
    with pytest.raises(NotImplementedError, match="other: not on this machine"):
        attention.dense_attention(*make(T=34))


@pytest.mark.parametrize("name", ["cudnn", "triton"])
def test_gpu_implementations_decline_on_a_cpu_in_one_sentence(name):
    cpu = jax.devices("cpu")[0]
    q, k, v = (jax.device_put(x, cpu) for x in make(T=33, dtype="bfloat16"))
    with pytest.raises(NotImplementedError, match=f"{name}: it needs an NVIDIA GPU of compute capability 8.0 or later"):
        attention.dense_attention(q, k, v, implementation=name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("Out of memory, and pages more", "memory than is free$"),
        ("Shared memory size limit exceeded", "shared memory than a GPU program may use$"),
        ("Out of host memory while trying to allocate", "pinned host memory .* XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"),
    ],
)
def test_memory_that_does_not_suffice_is_said_with_the_sizes(monkeypatch, error, said):
    def exhaust(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {error}")

    monkeypatch.setattr(attention, "_dense", exhaust)
    sizes = r"^attention of q float32\[1, 7, 4, 16\] to k and v float32\[1, 7, 2, 16\] needs more "
    with pytest.raises(MemoryError, match=sizes + said):
        attention.dense_attention(*make(T=7))


def test_traced_kinds_and_sizes_that_make_no_sense_give_nan():
    q, k, v = make()
    pattern = arrays(*MIXED)
    nonsense = pattern._replace(kind=jnp.array([7, 1, 2, 3]), window_size=jnp.zeros(4, jnp.int32))
    out = np.asarray(jax.jit(attention.sparse_attention)(q, k, v, nonsense))
    assert np.isnan(out[:, :, :2]).all()
    assert np.isfinite(out[:, :, 2:]).all()


def test_more_blocks_than_the_capacity_are_refused_or_made_nan_where_they_are_traced():
    q, k, v = make(T=330)
    pattern = arrays(*[BlockSparse(num_blocks=5), Dense()] * 2)
    assert np.isfinite(np.asarray(attention.sparse_attention(q, k, v, pattern))).all()
    with pytest.raises(ValueError, match=r"head 0 .*num_blocks=5.* at most max_num_blocks=4 blocks"):
        attention.sparse_attention(q, k, v, pattern, max_num_blocks=4)
    out = jax.jit(functools.partial(attention.sparse_attention, max_num_blocks=4))(q, k, v, pattern)
    assert np.isnan(np.asarray(out)[:, :, ::2]).all()
    assert np.isfinite(np.asarray(out)[:, :, 1::2]).all()


Q, K_, V = (np.zeros((1, 8, n, 16), np.float32) for n in (4, 2, 2))
BAD = {
    "must have four axes": {"q": Q[0]},
    "must have one shape": {"v": V[:, :4]},
    "batch and head_dim of q": {"k": K_[..., :8], "v": V[..., :8]},
    "no axis may be empty": {"q": Q[:, :0]},
    "num_heads=3 must be a multiple of num_kv_heads=2": {"q": Q[:, :, :3]},
    "one dtype of float32, bfloat16, float16": {"k": K_.astype(np.float16)},
    "int32": {"q": Q.astype(np.int32)},
    "q_len=4 differs from kv_len=8: give q_offset": {"q": Q[:, :4]},
    "kv_len=9 must lie between 0 and 8": {"kv_len": 9},
    r"kv_len=\[-1\] must lie between": {"kv_len": np.array([-1])},
    "kv_len is float32": {"kv_len": jnp.float32(3)},
    r"integers of shape \(1,\)": {"kv_len": np.array([1, 2])},
    "q_offset=-1 must lie between": {"q_offset": -1},
    "scale=nan must be a finite": {"scale": float("nan")},
    "implementation='cuda' is not one of": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(message):
    call = {"q": Q, "k": K_, "v": V} | BAD[message]
    call = {name: jnp.asarray(x) if name in "qkv" else x for name, x in call.items()}
    for run in (attention.dense_attention, attention.vertical_slash_attention):
        with pytest.raises(ValueError, match=message) as caught:
            run(**call)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": np.array([0, 1, 2, 9])}, "head 3 .*kind=9.*a code of PatternKind"),
        ({"kind": np.array([0, 1])}, r"integers of shape \(4,\), one a head"),
        ({"sink_size": np.full(4, -3)}, "head 1 .*sink_size=-3.*positive sizes"),
        ({"slash_size": np.full(4, 1.5)}, "must be integers"),
    ],
)
def test_pattern_arrays_that_do_not_fit_are_refused(change, message):
    q, k, v = make(T=8)
    with pytest.raises(ValueError, match=message):
        attention.sparse_attention(q, k, v, arrays(*MIXED)._replace(**change))

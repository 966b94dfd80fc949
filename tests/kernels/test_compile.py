"""GPU kernels compile for the cards that they are for, without spills, on machines that have no GPU too."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from deviceless import CARDS, Case, available, compile_cases
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


def _flash_kernel(lengths_ref, q_ref, k_ref, v_ref, out_ref, *, block_kv):
    q = q_ref[...]

    def step(j, carry):
        acc, m, l = carry
        here = pl.ds(j * block_kv, block_kv)
        s = jnp.dot(q, k_ref[here, :].T, preferred_element_type=jnp.float32)
        new_m = jnp.maximum(m, s.max(axis=1))
        p = jnp.exp2(s - new_m[:, None])
        alpha = jnp.exp2(m - new_m)
        added = jnp.dot(p.astype(q.dtype), v_ref[here, :], preferred_element_type=jnp.float32)
        return acc * alpha[:, None] + added, new_m, l * alpha + p.sum(axis=1)

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    blocks = pl.cdiv(lengths_ref[pl.program_id(0)], block_kv)
    acc, _, l = lax.fori_loop(0, blocks, step, (jnp.zeros(q.shape, jnp.float32), zeros - jnp.inf, zeros))
    out_ref[...] = (acc / l[:, None]).astype(out_ref.dtype)


def flash(lengths, q, k, v, *, block_q, block_kv, num_warps, num_stages=2):
    heads, rows, head_dim = q.shape
    queries = pl.BlockSpec((None, block_q, head_dim), lambda h, i: (h, i, 0))
    keys = pl.BlockSpec((None, *k.shape[1:]), lambda h, i: (h, 0, 0))
    return pl.pallas_call(
        functools.partial(_flash_kernel, block_kv=block_kv),
        grid=(heads, rows // block_q),
        in_specs=[pl.BlockSpec(lengths.shape, lambda h, i: (0,)), queries, keys, keys],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )(lengths, q, k, v)


def flash_case(name, head_dim=128, dtype=jnp.bfloat16, **tiles):
    array = jax.ShapeDtypeStruct((4, 4096, head_dim), dtype)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    return Case(name, functools.partial(flash, **tiles), (lengths, array, array, array))


CASES = [
    flash_case("64 by 64", block_q=64, block_kv=64, num_warps=4),
    flash_case("64 by 64, head_dim 64, float16", 64, jnp.float16, block_q=64, block_kv=64, num_warps=4),
    flash_case("128 by 64", block_q=128, block_kv=64, num_warps=8),
]
SPILLING = flash_case("far too few warps", block_q=128, block_kv=64, num_warps=2)
TOO_LARGE = flash_case("far too large", block_q=256, block_kv=256, num_warps=8)
NO_KERNEL = Case("no kernel", jnp.cumsum, CASES[0].arguments[1:2])
COMPILED = [*CASES, SPILLING, TOO_LARGE, NO_KERNEL]

each_case = pytest.mark.parametrize("name", [case.name for case in CASES])


@pytest.fixture(scope="module", params=CARDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reports(kind):
    if reason := available():
        if os.environ.get("MINFERENCE_JAX_NEEDS_COMPILER"):  # set in the gate, where nothing of this may be skipped
            pytest.fail(reason)
        pytest.skip(reason)
    return compile_cases(kind, __file__, "COMPILED")


@each_case
def test_kernels_compile_without_spills_within_the_cards_shared_memory(reports, kind, name):
    report = reports[name]
    assert report.error is None
    assert report.spill_bytes == 0, report
    assert 0 < report.registers <= 255
    assert 0 < report.shared_bytes <= CARDS[kind].shared_memory_limit


@each_case
def test_kernels_use_warpgroup_matrix_products_where_the_card_has_them(reports, kind, name):
    assert reports[name].wgmma == (kind == "h100")


def test_spills_are_counted(reports):
    assert reports[SPILLING.name].spill_bytes > 1000


def test_too_large_a_tile_is_an_error_in_its_report(reports, kind):
    error = reports[TOO_LARGE.name].error
    assert "RESOURCE_EXHAUSTED" in error
    assert str(CARDS[kind].shared_memory_limit) in error


def test_a_function_that_holds_no_kernel_is_not_taken_for_one_that_compiles_well(reports):
    assert "no Pallas kernel" in reports[NO_KERNEL.name].error

"""GPU kernels compile for the cards that they are for, without spills, on machines that have no GPU too."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from deviceless import CARDS, Case, available, compile_cases

from minference_jax.kernels import mass_triton, select_triton, sparse_mosaic_gpu, sparse_triton
from minference_jax.kernels.layouts import SparseLayout
from minference_jax.kernels.tiles import (
    Device,
    TileConfig,
    mosaic_gpu_tiles,
    mosaic_gpu_widest,
    shared_memory_bytes,
    triton_tiles,
)

LENGTH = 8192


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def attend(q, k, v, layout, q_offset, kv_len, *, tiles, kernel, skip_threshold):
    where = {"q_offset": q_offset, "kv_len": kv_len, "tiles": tiles, "skip_threshold": skip_threshold}
    return kernel.attention(q, k, v, layout, scale=0.1, **where)


def attention_case(name, tiles, head_dim, dtype, num_blocks=32, kernel=sparse_triton, skip_threshold=None):
    """Attention of 8 heads over 2 KV heads with room for every kind of pattern."""
    rows, heads = -(-LENGTH // tiles.block_q), (1, 8)
    layout = SparseLayout(
        offsets=array(*heads, LENGTH // tiles.block_kv + 3),
        offset_counts=array(*heads),
        columns=array(*heads, 512),
        column_counts=array(*heads),
        windows=array(*heads),
        block_ids=array(*heads, rows, num_blocks),
        block_counts=array(*heads, rows),
    )
    q, k = (array(1, LENGTH, n, head_dim, dtype=dtype) for n in (8, 2))
    run = functools.partial(attend, tiles=tiles, kernel=kernel, skip_threshold=skip_threshold)
    return Case(name, run, (q, k, k, layout, array(1), array(1)))


def device_of(kind):
    capability = tuple(int(x) for x in CARDS[kind].capability.rstrip("a").split("."))
    return Device(platform="cuda", kind=CARDS[kind].name, compute_capability=capability)


def chosen(kind):
    """Every Triton kernel at every head_dim and dtype, with the tiles that are chosen for a card."""
    device = device_of(kind)
    sizes = {"bfloat16": (64, 80, 96, 128, 256), "float32": (64, 128, 256), "float16": (128,)}
    for dtype, head_dim in ((dtype, size) for dtype, some in sizes.items() for size in some):
        tiles = triton_tiles(device, head_dim, jnp.dtype(dtype).itemsize)
        yield attention_case(f"attention, {dtype}, head_dim {head_dim}", tiles, head_dim, dtype)
    yield attention_case("attention without listed blocks", triton_tiles(device, 128, 2), 128, "bfloat16", num_blocks=0)
    yield attention_case(
        "attention that skips, bfloat16", triton_tiles(device, 128, 2), 128, "bfloat16", skip_threshold=1e-3
    )
    for dtype, head_dim in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 128)):
        q, k = (array(1, n, heads, head_dim, dtype=dtype) for n, heads in ((64, 8), (LENGTH, 2)))
        mass = functools.partial(mass_triton.attention_mass, scale=0.1)
        yield Case(f"mass, {dtype}, head_dim {head_dim}", mass, (q, k, array(1, 64)))
    for size in (600, 1 << 20):
        yield Case(f"top k of {size}", select_triton.top_k_mask, (array(8, size, dtype=jnp.float32), array(8)))


def with_tiles(name, **sizes):
    return attention_case(name, TileConfig(**sizes), 128, "bfloat16")


def bounds(kind):
    """The shared memory that each attention case takes at most, by the rule that tiles are chosen by."""
    cases = [case for case in chosen(kind) if case.name.startswith("attention")]
    sizes = [(case.function.keywords["tiles"], case.arguments[0]) for case in cases]
    return {
        case.name: shared_memory_bytes(tiles, q.shape[-1], q.dtype.itemsize)
        for case, (tiles, q) in zip(cases, sizes, strict=True)
    }


def mosaic():
    """The Mosaic GPU kernel with the tiles that are chosen for an H100, and with large ones."""
    some = (
        (64, 64, "float16"),
        (64, 80, "bfloat16"),
        (64, 96, "float16"),
        (64, 128, "bfloat16"),
        (64, 192, "bfloat16"),
    )
    wide = ((64, 256, "bfloat16"), (128, 256, "float16")) if mosaic_gpu_widest() == 256 else ()
    for size, head_dim, dtype in (*some, *wide, (128, 128, "bfloat16")):
        tiles = dataclasses.replace(mosaic_gpu_tiles(device_of("h100"), head_dim, 2), block_q=size, block_kv=size)
        name = f"mosaic, {size} x {size}, {dtype}, head_dim {head_dim}"
        yield attention_case(name, tiles, head_dim, dtype, kernel=sparse_mosaic_gpu)
    for head_dim in (128, mosaic_gpu_widest()):
        tiles = dataclasses.replace(mosaic_gpu_tiles(device_of("h100"), head_dim, 2), block_q=128, block_kv=128)
        name = f"mosaic that skips, head_dim {head_dim}"
        yield attention_case(name, tiles, head_dim, "bfloat16", kernel=sparse_mosaic_gpu, skip_threshold=1e-3)


CHOSEN = {kind: bounds(kind) for kind in CARDS}
SPILLING = with_tiles("far too few warps", block_q=64, block_kv=32, num_warps=1)
TOO_LARGE = with_tiles("far too large", block_q=256, block_kv=256, num_warps=8)
NO_KERNEL = Case("no kernel", jnp.cumsum, (array(4),))
MOSAIC = list(mosaic())
SPILLED_BY_VOTES = {"mosaic that skips, head_dim 128": 64, "mosaic that skips, head_dim 192": 128}
"""Most bytes: a vote on what to leave out, off by default, costs registers."""
CASES_A100 = list(chosen("a100"))
CASES_H100 = [*chosen("h100"), SPILLING, TOO_LARGE, NO_KERNEL]
CASES = [case.name for case in CASES_A100]

each_case = pytest.mark.parametrize("name", CASES)


MARKS = {"h100": [], "a100": [pytest.mark.slow]}  # the same kernels: the second leg of the gate leaves the A100 out
on_an_h100 = pytest.mark.parametrize("kind", ["h100"], indirect=True)


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=MARKS[kind]) for kind in CARDS])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reports(kind):
    return compiled(kind, f"CASES_{kind.upper()}")


@pytest.fixture(scope="module")
def mosaic_reports():
    return compiled("h100", "MOSAIC")


def compiled(kind, cases):
    if reason := available():
        if os.environ.get("MINFERENCE_JAX_NEEDS_COMPILER"):  # set in the gate, where nothing of this may be skipped
            pytest.fail(reason)
        pytest.skip(reason)
    return compile_cases(kind, __file__, cases)


@each_case
def test_kernels_compile_without_spills_within_the_cards_shared_memory(reports, kind, name):
    report = reports[name]
    assert report.error is None
    assert report.spill_bytes <= (64 if "float32" in name else 0), report  # float32 is to be right, not fast
    assert 0 < report.registers <= 255
    assert 0 < report.shared_bytes <= CARDS[kind].shared_memory_limit
    if name in CHOSEN[kind]:  # the bound by which tiles are chosen
        assert report.shared_bytes <= CHOSEN[kind][name]


@pytest.mark.parametrize("name", [name for name in CASES if "float16" in name or "without" in name])
def test_half_precision_runs_on_warpgroup_matrix_products_where_the_card_has_them(reports, kind, name):
    assert reports[name].wgmma == (kind == "h100")


@pytest.mark.parametrize("name", [case.name for case in MOSAIC])
def test_mosaic_kernels_compile_without_spills_and_their_products_run_on(mosaic_reports, name):
    report = mosaic_reports[name]
    assert report.error is None
    assert 0 < report.registers <= 255
    assert report.spill_bytes <= SPILLED_BY_VOTES.get(name, 0), report
    assert not report.serialized


@on_an_h100
def test_spills_are_counted(reports):
    assert reports[SPILLING.name].spill_bytes > 1000


@on_an_h100
def test_too_large_a_tile_is_an_error_in_its_report(reports, kind):
    error = reports[TOO_LARGE.name].error
    assert "RESOURCE_EXHAUSTED" in error
    assert str(CARDS[kind].shared_memory_limit) in error


@on_an_h100
def test_a_function_that_holds_no_kernel_is_not_taken_for_one_that_compiles_well(reports):
    assert "no Pallas kernel" in reports[NO_KERNEL.name].error

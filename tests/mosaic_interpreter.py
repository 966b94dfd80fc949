"""The Mosaic GPU kernel on a CPU: in JAX's interpreter of such kernels, which also looks for races.

What the interpreter of jax 0.12 lacks is given here: sums of matrix products that stand in registers, two views of the
same shared memory, and rows before the first, which the copy engine fills with zeros.
"""

import contextlib
import os
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from minference_jax.kernels import program_mosaic_gpu, sparse_mosaic_gpu, warpgroup_mosaic_gpu, wide_mosaic_gpu

THREADS = 8
"""Warpgroups wait for each other in threads of XLA's own, and it has as many as cores, or as NPROC says."""


class Register:
    """A value that a run changes: an accumulator of matrix products, or another one."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, _):
        return self.value

    def __setitem__(self, _, value):
        self.value = value


def _run_state(run):
    def called(state):
        registers = jax.tree.map(lambda one: one if isinstance(one, Register) else Register(one), state)
        run(registers)
        return jax.tree.map(lambda one: one.value, registers)

    return called


def _multiply(total, a, b):
    a = a if isinstance(a, jax.Array) else a[...]
    total.value += jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
    plgpu.commit_smem()  # products read shared memory as the copy engine does, not as threads do


def _kernel(body, *, scratch_types, **how):
    """As ``plgpu.kernel``, interpreted, with both views of a union the same, and zeros before the first key."""
    is_union = [isinstance(one, tuple) for one in scratch_types]
    memory = [plgpu.SMEM(one[0].shape, one[0].dtype) if isinstance(one, tuple) else one for one in scratch_types]

    def interpreted(*refs):
        given, kept = refs[: -len(memory)], refs[-len(memory) :]
        return body(*given, *((ref, ref) if both else ref for ref, both in zip(kept, is_union, strict=True)))

    params = plgpu.InterpretGPUParams(detect_races=True)
    run = plgpu.kernel(interpreted, scratch_types=memory, interpret=params, **how)

    def call(q, k, v, *rest):
        before = [(0, 0), (k.shape[1], 0), (0, 0), (0, 0)]
        return run(q, jnp.pad(k, before), jnp.pad(v, before), *rest)

    return call


def _bring(program, part, place, number, bring=program_mosaic_gpu._bring):
    if not part.of_columns:
        zeros = program.k.shape[1] // 2
        part = part._replace(start=lambda place, half, start=part.start: start(place, half) + zeros)
    bring(program, part, place, number)


@contextlib.contextmanager
def interpreted(moves_registers=True):
    """The kernel is interpreted where it is traced in here, as for threads that do or don't get registers from others.

    A race is an error.
    """
    products = {"wgmma": _multiply, "ACC": types.SimpleNamespace(init=Register)}
    products["wgmma_accumulator_load"] = lambda total, wait_n: total.value
    with pytest.MonkeyPatch.context() as patch:
        for module in (warpgroup_mosaic_gpu, wide_mosaic_gpu):
            patch.setattr(module, "pl", _with(pl, run_state=_run_state))
            patch.setattr(module, "plgpu", _with(plgpu, **products))
        patch.setattr(sparse_mosaic_gpu, "plgpu", _with(plgpu, kernel=_kernel, RefUnion=lambda *views: views))
        patch.setattr(sparse_mosaic_gpu, "mosaic_gpu_moves_registers", lambda: moves_registers)
        patch.setattr(program_mosaic_gpu, "_bring", _bring)
        yield


def _with(module, **others):
    return types.SimpleNamespace(**(vars(module) | others))


def why_not():
    """Why it can't run here; None = it can."""
    if jax.__version_info__ < (0, 12):
        return "jax before 0.12 can't interpret it"
    if int(os.environ.get("NPROC", os.cpu_count())) < THREADS:
        return f"needs {THREADS} cores, or NPROC={THREADS}"
    return None

"""The implementations of attention, and which of them can do a call where it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import Array

from minference_jax import estimate
from minference_jax.kernels import flash_cudnn, flash_xla, mass_triton, select_triton, sparse_triton, sparse_xla
from minference_jax.kernels.tiles import (
    Device,
    TileConfig,
    check_mosaic_gpu_tiles,
    check_triton_tiles,
    check_xla_tiles,
    mosaic_gpu_tiles,
    triton_tiles,
    xla_tiles,
)


class Implementation(NamedTuple):
    """One way to compute attention.

    Attributes:
      name: what ``implementation`` calls it.
      tiles: (device, head_dim, bytes of an element) -> TileConfig; raises NotImplementedError where it can't run.
      dense: (q, k, v, *, scale, q_offset, kv_len, tiles, skip_threshold=None) -> (out, lse).
      sparse: (q, k, v, layout, *, scale, q_offset, kv_len, tiles, skip_threshold=None) -> (out, lse); None = it has
        none.
      estimate: what estimation runs beside ``sparse``.
      whole_prompts_only: ``dense`` is (q, k, v, *, scale, kv_len) -> out, for queries that start at position 0.
      break_even: tokens from which sparse attention with usual patterns is faster than dense attention by the first
        implementation that can, estimate and layout included: measured by the bench.
      min_q_len: with fewer queries it is slower than the others, and tried by its name only.
      check_tiles: (tiles, device, head_dim, bytes of an element); raises ValueError where a caller's tiles do not fit.
    """

    name: str
    tiles: Callable[[Device, int, int], TileConfig]
    dense: Callable[..., Any]
    sparse: Callable[..., tuple[Array, Array]] | None
    estimate: estimate.EstimateKernels = estimate.XLA
    whole_prompts_only: bool = False
    break_even: int = 0
    min_q_len: int = 1
    check_tiles: Callable[[TileConfig, Device, int, int], None] = check_xla_tiles


Run = Callable[[Implementation, TileConfig], Any]


def _mosaic_gpu(function: str) -> Callable[..., Any]:
    """A function of the Mosaic GPU kernel, imported when it is called: its compiler is not in every build of jaxlib."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from minference_jax.kernels import sparse_mosaic_gpu

        return getattr(sparse_mosaic_gpu, function)(*args, **kwargs)

    return call


TRITON_ESTIMATE = estimate.EstimateKernels(mass_triton.attention_mass, select_triton.top_k_mask)
IMPLEMENTATIONS = (
    Implementation("cudnn", flash_cudnn.check_device, flash_cudnn.attention, None, whole_prompts_only=True),
    Implementation(
        "mosaic_gpu",
        mosaic_gpu_tiles,
        _mosaic_gpu("dense"),
        _mosaic_gpu("attention"),
        TRITON_ESTIMATE,
        break_even=16384,
        min_q_len=64,
        check_tiles=check_mosaic_gpu_tiles,
    ),
    Implementation(
        "triton",
        triton_tiles,
        sparse_triton.dense,
        sparse_triton.attention,
        TRITON_ESTIMATE,
        break_even=16384,
        min_q_len=16,
        check_tiles=check_triton_tiles,
    ),
    Implementation("xla", xla_tiles, flash_xla.attention, sparse_xla.attention, break_even=8192),
)
"""In the order in which ``implementation=None`` tries them."""


def named(name: str | None) -> list[Implementation]:
    """The implementation of that name, or all of them in order.

    Raises:
      ValueError: there is none of that name.
    """
    entries = [entry for entry in IMPLEMENTATIONS if name in (None, entry.name)]
    if not entries:
        raise ValueError(f"implementation={name!r} is not one of {[entry.name for entry in IMPLEMENTATIONS]}")
    return entries


def first_that_can(
    run: Run, name: str | None, where: tuple[Device, int, int], q_len: float = math.inf, sparse: bool = False
) -> Any:
    """Runs the named implementation, or the first that does not decline with NotImplementedError.

    ``where`` is the device, head_dim and bytes of an element. What is slower with ``q_len`` queries is tried by name
    only; where attention is to be ``sparse``, what has none declines.
    """
    reasons = []
    for entry in (entry for entry in named(name) if name is not None or q_len >= entry.min_q_len):
        try:
            tiles = entry.tiles(*where)
            if sparse and entry.sparse is None:
                raise NotImplementedError("it has no sparse attention")
            return run(entry, tiles)
        except NotImplementedError as error:
            reasons.append(f"{entry.name}: {error}")
    raise NotImplementedError("; ".join(reasons))


def first_sparse(name: str | None, device: Device, head_dim: int, itemsize: int) -> Implementation:
    """The named implementation of sparse attention, or the first that can run on a device.

    Raises:
      ValueError: there is none of that name. NotImplementedError: it can't run there.
    """
    return first_that_can(lambda entry, tiles: entry, name, (device, head_dim, itemsize), sparse=True)


def device_of(*arrays: Any) -> Device:
    """Where a computation on these arrays runs: where the first is, or on jax's default device where all are traced."""
    known = [x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if known:
        device = min(known[0].devices(), key=lambda device: device.id)
    elif isinstance(default, str):
        device = jax.devices(default)[0]
    else:
        device = default or jax.devices()[0]
    if device.platform != "gpu":
        return Device(platform=device.platform, kind=device.device_kind)
    if "cuda" not in device.client.platform_version.lower():
        return Device(platform="rocm", kind=device.device_kind)
    major, minor = str(device.compute_capability).split(".")
    return Device(platform="cuda", kind=device.device_kind, compute_capability=(int(major), int(minor)))


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Says in one sentence what did not fit the device, where XLA gives pages of its own.

    Raises:
      MemoryError: what runs inside the block does not fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"{what} needs more {_memory_that_ran_out(str(error))}") from error


def _memory_that_ran_out(error: str) -> str:
    if "Out of host memory" in error:
        return (
            "pinned host memory than jax may take; it takes 64 GB at most where the environment variable "
            "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says no other number"
        )
    return "shared memory than a GPU program may use" if "Shared memory" in error else "memory than is free"

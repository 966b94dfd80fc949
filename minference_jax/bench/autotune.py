"""Which tile sizes are the fastest on this device: each is checked against the oracle, then timed beside the default.

The default are the sizes that the device has by rule. Lists are constructed, as `bench.inputs` says.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minference_jax.bench import inputs, oracle
from minference_jax.bench.attention import CHECK_LENGTH, prepare, timed
from minference_jax.bench.cases import Case, Sizes
from minference_jax.bench.inputs import Activations
from minference_jax.implementations import Implementation, device_of, first_sparse, memory_for
from minference_jax.kernels.tiles import Device, TileConfig, mosaic_gpu_shared_memory_bytes, shared_memory_bytes
from minference_jax.patterns import VerticalSlash
from minference_jax.tile_table import TileEntry

GAIN = 0.98
"""A choice replaces the default where it takes at most this share of its time."""
MAX_ACCUMULATOR = 1 << 16
"""Bytes of float32 sums, block_q * head_dim of them, that a Triton program is not made to hold more of."""
FINALISTS = 3
"""So many of the fastest are timed once more, with the default, all in turn."""

Run = Callable[[], Array]


class Trial(NamedTuple):
    """What became of one choice.

    Attributes:
      tiles: the choice.
      error: the largest error against the oracle, in the terms of `bench.oracle`; None where it gave no output.
      ms: median time of the kernel in milliseconds; None where the choice is left out.
      default_ms: that of the default, timed in turn with it; None where the choice is left out or is the default.
      reason: why the choice is left out; None where it is not.
    """

    tiles: TileConfig
    error: float | None = None
    ms: float | None = None
    default_ms: float | None = None
    reason: str | None = None

    @property
    def share(self) -> float:
        """Its time over that of the default; infinite where it was not timed beside that."""
        return math.inf if self.ms is None or self.default_ms is None else self.ms / self.default_ms


def candidates(device: Device, implementation: str, head_dim: int, itemsize: int) -> list[TileConfig]:
    """The tile sizes that are worth a measurement.

    Args:
      device: where they would run.
      implementation: "mosaic_gpu", "triton" or "xla".
      head_dim: H.
      itemsize: bytes of one element of q, k and v.
    """
    if implementation == "mosaic_gpu":
        choices = itertools.product((64, 128), (3, 2))
        some = [TileConfig(block_q=size, block_kv=size, num_stages=stages) for size, stages in choices]
        return [tiles for tiles in some if mosaic_gpu_shared_memory_bytes(tiles, head_dim) <= device.shared_memory]
    if implementation != "triton":
        return [TileConfig(block_q=q, block_kv=kv) for q, kv in ((64, 64), (128, 64), (64, 32))]
    found = []
    size = 128 // itemsize  # rows of the same bytes whatever the dtype: 64 in half precision
    sizes = ((size, 2 * size), (size // 2, size, 2 * size), (4, 8), (1, 2, 3))
    for block_q, block_kv, num_warps, num_stages in itertools.product(*sizes):
        if block_q % block_kv or block_q * head_dim * 4 > MAX_ACCUMULATOR:
            continue
        tiles = TileConfig(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages)
        if shared_memory_bytes(tiles, head_dim, itemsize) <= device.shared_memory:
            found.append(tiles)
    return found


def tuning_case(*, head_dim: int, dtype: str, num_heads: int, num_kv_heads: int, length: int) -> Case:
    """Vertical-slash heads as long prompts have them: 1000 keys, 2048 distances, most of these the nearest.

    Args:
      head_dim: H.
      dtype: of q, k and v.
      num_heads, num_kv_heads: N and K.
      length: tokens; at most a quarter of them are distances.

    Raises:
      ValueError: N is not a multiple of K.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
    pattern = VerticalSlash(vertical_size=1000, slash_size=max(1, min(2048, length // 4)))
    return Case(
        name="autotune",
        sizes=(Sizes(pattern=pattern, local_share=0.97),),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        lengths=(length,),
    )


def autotune(
    *,
    implementation: str | None = None,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    num_heads: int = 32,
    num_kv_heads: int = 8,
    length: int = 32768,
    repeats: int = 5,
) -> Iterator[Trial | TileEntry]:
    """Measures tile sizes on jax's default device: yields a Trial of each as soon as it is known, the default's first.

    What comes last is the TileEntry to store. Its tiles are the default's, unless others took at most ``GAIN`` of the
    default's time both alone with it and beside the other fastest.

    Args:
      implementation: "mosaic_gpu", "triton" or "xla"; None = the first that can on this device.
      head_dim: H.
      dtype: "float32", "bfloat16" or "float16", of q, k and v.
      num_heads, num_kv_heads: N and K.
      length: tokens.
      repeats: timed runs of each choice, after one that warms up.

    Raises:
      ValueError: N is not a multiple of K, or there is no such implementation.
      NotImplementedError: the implementation can't run here.
      WrongResult: the default's output differs from the oracle's.
      MemoryError: the default does not fit the device.
    """
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    case, device = tuning_case(head_dim=head_dim, dtype=dtype, length=length, **heads), device_of()
    itemsize = jnp.dtype(dtype).itemsize
    entry = first_sparse(implementation, device, head_dim, itemsize)
    default = entry.tiles(device, head_dim, itemsize)
    with memory_for(f"attention of {length} tokens, {num_heads} heads of {head_dim=}, {dtype},"):
        tuner = _Tuner(case, length, entry)
        error, default_run = tuner.check(default)
        (ms,) = _medians([default_run], repeats)
    yield Trial(default, error, ms)

    promising: list[tuple[Trial, Run]] = []
    for tiles in candidates(device, entry.name, head_dim, itemsize):
        if tiles == default:
            continue
        try:
            error, run = tuner.check(tiles)
            default_ms, ms = _medians([default_run, run], repeats)
        except (jax.errors.JaxRuntimeError, NotImplementedError, oracle.WrongResult) as reason:
            yield Trial(tiles, reason=str(reason).partition("\n")[0][:200])
            continue
        trial = Trial(tiles, error, ms, default_ms)
        if trial.share <= GAIN:
            promising = sorted([*promising, (trial, run)], key=lambda pair: pair[0].share)[:FINALISTS]
        yield trial

    default_ms, *others = _medians([default_run, *(run for _, run in promising)], repeats)
    times = {trial.tiles: ms for (trial, _), ms in zip(promising, others, strict=True)}
    chosen = min(times, key=lambda tiles: times[tiles], default=default)
    if times.get(chosen, math.inf) > GAIN * default_ms:
        chosen = default
    yield TileEntry(
        device=device.kind,
        implementation=entry.name,
        head_dim=head_dim,
        dtype=dtype,
        tiles=chosen,
        measured_ms=times[chosen] if chosen != default else default_ms,
        heuristic_ms=default_ms,
    )


def describe(tiles: TileConfig) -> str:
    """Tile sizes in words."""
    return f"{tiles.block_q} x {tiles.block_kv}, {tiles.num_warps} warps, {tiles.num_stages} stages"


def _medians(runs: Sequence[Run], repeats: int) -> list[float]:
    """Milliseconds of each, all timed in turn."""
    times = timed({str(index): (repeats, run) for index, run in enumerate(runs)}, in_turn=True)
    return [statistics.median(values) for values in times.values()]


class _Tuner:
    """Inputs at a small length and at the full one, on which the kernel runs with all tile sizes."""

    def __init__(self, case: Case, length: int, entry: Implementation):
        self._entry = entry
        sizes = ((case.small(), CHECK_LENGTH), (case, length))
        self._small, self._full = ((case, size, inputs.random_activations(case, size)) for case, size in sizes)

    def check(self, tiles: TileConfig) -> tuple[float, Run]:
        """Checks the kernel over all queries at the small length, and over some at the full one.

        Returns:
          the larger error, and the call at the full length.

        Raises:
          WrongResult: an error is above what is allowed.
          JaxRuntimeError, NotImplementedError: the kernel can't be compiled or run with these tiles.
        """
        error, _ = self._run(*self._small, tiles, oracle.whole_error)
        full_error, run = self._run(*self._full, tiles, oracle.sampled_error)
        return max(error, full_error), run

    def _run(
        self, case: Case, length: int, qkv: Activations, tiles: TileConfig, compare: Callable[..., Array | float]
    ) -> tuple[float, Run]:
        shape = TileConfig(block_q=tiles.block_q, block_kv=tiles.block_kv)  # all that a layout depends on
        calls = prepare(case, length, self._entry, shape, qkv, estimated=False)
        layout = inputs.dense_where_cheaper(calls.layout, length, shape)
        run = functools.partial(calls.kernel, *qkv, layout, tiles=tiles)
        where: dict[str, Any] = {"scale": case.head_dim**-0.5, "tiles": shape, "dtype": case.dtype}
        error = float(compare(qkv, run(), layout, **where))
        return oracle.check(error, case.dtype, f"{describe(tiles)}, {length} tokens"), run

"""The attention suite: sparse against dense attention of one layer, with its index and its kernel timed apart.

A kernel is checked against the oracle before it is timed: whole at a small length, and a few query tiles of the very
output that is then timed. The estimate and the layout are always computed and timed on the queries and keys at hand;
which lists the kernel reads is said in ``bench.inputs``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from minference_jax import estimate
from minference_jax.attention import check_skip_threshold, dense_attention
from minference_jax.bench import inputs, oracle
from minference_jax.bench.cases import (
    CPU_CASES,
    GPU_CASES,
    Case,
    activation_cases,
    describe,
    plan,
    select_cases,
)
from minference_jax.bench.inputs import Activations
from minference_jax.bench.records import peak_bytes, record
from minference_jax.capacities import check_pattern
from minference_jax.implementations import Implementation, device_of, first_sparse
from minference_jax.index import build_layout
from minference_jax.kernels import flash_cudnn
from minference_jax.kernels.layouts import SparseLayout, everything
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import AShape, Dense, VerticalSlash

CHECK_LENGTH = 1024
"""Tokens at which a case is checked whole, in memory quadratic in them."""
FEW_REPEATS_FROM, BASELINE_ONCE_FROM, ONE_REPEAT_FROM = 1 << 18, 1 << 18, 1 << 20
"""Tokens from which a GPU is timed less often, from which cases of one shape share their baseline's times, and from
which a GPU's baseline is timed once."""
WARM_SECONDS = 0.3
"""Of each call on a GPU before it is timed."""
RUN_MILLISECONDS, MAX_CALLS = 10.0, 50
"""A run of a call on a GPU takes at least so long: shorter calls are handed out in a row, at most so many, so that the
host's own time for each is hidden as it is between the layers of a model."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """One case at one length as jitted calls.

    Attributes:
      kernel: (q, k, v, layout) -> out [1, T, N, H]; takes a skip_threshold, too.
      layout: what the kernel reads.
      index: (q, k) -> what the pattern's estimate and layout give; None where attention is dense.
      mass: (q, k) -> attention mass, the first part of ``index``; None where the pattern has no such part.
    """

    kernel: Callable[..., Array]
    layout: SparseLayout
    index: Callable[..., SparseLayout] | None
    mass: Callable[..., tuple[Array, Array]] | None


class Bench:
    """The suite on one device; what measurements share is kept between them.

    Args:
      implementation: of sparse attention: "mosaic_gpu", "triton" or "xla"; None = the first that can on this device.
      tiles: None = those that suit the device.
      repeats: timed runs, after one that warms up; None = 8, and 3 on CPUs and from 256K tokens on.
      baseline_repeats: of dense attention; None = as ``repeats``, and 1 at 1M tokens on GPUs.
      activations: of one layer, from ``read_activations``, whose estimated lists the kernels read; None = random
        activations and constructed lists.
      skip_threshold: as in ``sparse_attention``: the kernel is timed with it, too, and its error is then measured, but
        not judged. Random activations have no tiles to leave out: there it shows what a threshold costs.
    """

    def __init__(
        self,
        *,
        implementation: str | None = None,
        tiles: TileConfig | None = None,
        repeats: int | None = None,
        baseline_repeats: int | None = None,
        activations: Activations | None = None,
        skip_threshold: float | None = None,
    ):
        self.device = device_of()
        self.implementation, self.tiles, self.saved = implementation, tiles, activations
        self.repeats, self.baseline_repeats = repeats, baseline_repeats
        self.skip_threshold = check_skip_threshold(skip_threshold)
        self._errors: dict[tuple, float] = {}
        self._baselines: dict[tuple, list[float]] = {}

    def cases(self) -> list[Case]:
        """All cases of this device, with the shape of the saved activations where there are any."""
        cases = GPU_CASES if self.device.platform == "cuda" else CPU_CASES
        if self.saved is None:
            return list(cases)
        return activation_cases(cases, *self.saved.q.shape[2:3], *self.saved.k.shape[2:])

    def plan(self, texts: Sequence[str] | None, lengths: Sequence[int] | None) -> list[tuple[Case, int]]:
        """The chosen cases and lengths, in the order in which they should be measured.

        Raises:
          ValueError: no case has such a name; the implementation or tiles make no sense.
          NotImplementedError: the implementation can't run a case on this device.
        """
        chosen = select_cases(self.cases(), texts)
        for case in chosen:
            self.choose(case)
        if lengths is None and self.saved is not None:
            lengths = (self.saved.q.shape[1],)
        return plan(chosen, lengths)

    def measure(self, case: Case, length: int) -> dict[str, Any]:
        """Checks, then times one case at one length; gives its record.

        Raises:
          WrongResult: the kernel or the baseline differs from the oracle.
          MemoryError: it does not fit the device.
          ValueError, NotImplementedError: as ``plan``; saved activations are shorter than ``length``.
        """
        try:
            return self._measure(case, length)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            heads = f"{case.num_heads} heads over {case.num_kv_heads} KV heads of head_dim {case.head_dim}"
            reason = str(error).splitlines()[0][:200]
            raise MemoryError(
                f"{case.name} at {length} tokens, {heads}, {case.dtype}, does not fit the device: {reason}"
            ) from error

    def choose(self, case: Case) -> tuple[Implementation, TileConfig]:
        where = (self.device, case.head_dim, jnp.dtype(case.dtype).itemsize)
        entry = first_sparse(self.implementation, *where)
        if self.tiles is not None:
            entry.check_tiles(self.tiles, *where)
        return entry, self.tiles or entry.tiles(*where)

    def _measure(self, case: Case, length: int) -> dict[str, Any]:
        entry, tiles = self.choose(case)
        before = peak_bytes()
        if self.saved is None:
            qkv = inputs.random_activations(case, length)
        else:
            qkv = inputs.saved_activations(self.saved, length, case.dtype)
        calls = prepare(case, length, entry, tiles, qkv, estimated=self.saved is not None)
        if calls.mass is not None:
            calls = dataclasses.replace(calls, layout=inputs.dense_where_cheaper(calls.layout, length, tiles))
        if calls.index is not None:
            jax.block_until_ready(calls.index(*qkv[:2]))
        out = jax.block_until_ready(calls.kernel(*qkv, calls.layout))
        after = peak_bytes()
        against = functools.partial(oracle.sampled_error, scale=case.head_dim**-0.5, tiles=tiles, dtype=case.dtype)
        sampled = against(qkv, out, calls.layout)
        del out
        skip_error = None
        if self.skip_threshold is not None:
            skip_error = against(qkv, self._skipping(qkv, calls)(), calls.layout)
        what = f"{case.name}, {entry.name}"
        error = max(self._check(case), oracle.check(sampled, case.dtype, f"{what}, {length} tokens"))
        name, baseline = self.baseline(case)
        times = self._times(case, length, qkv, calls, baseline)
        return record(
            **_described(case, length, tiles, estimated=self.saved is not None),
            **_figures(case, length, times, float(inputs.density_of(calls.layout, length, tiles).mean())),
            implementation=entry.name,
            baseline=name,
            error=error,
            skip_threshold=self.skip_threshold,
            skip_error=skip_error,
            peak_bytes=after if before is not None and after is not None and after > before else None,
        )

    def _check(self, case: Case) -> float:
        """The largest error of the case's kernel and of its baseline over all queries at ``CHECK_LENGTH`` tokens."""
        small = case.small()
        entry, tiles = self.choose(case)
        key = (small.sizes, case.slash_granularity, *_shape(case), entry.name, tiles)
        if key not in self._errors:
            qkv = inputs.random_activations(small, CHECK_LENGTH)
            calls = prepare(small, CHECK_LENGTH, entry, tiles, qkv, estimated=False)
            name, baseline = self.baseline(case)
            causal = everything(1, case.num_heads, CHECK_LENGTH, CHECK_LENGTH, tiles)
            outs = {entry.name: (calls.kernel(*qkv, calls.layout), calls.layout), name: (baseline(*qkv), causal)}
            where = {"scale": case.head_dim**-0.5, "tiles": tiles, "dtype": case.dtype}
            errors = {who: float(oracle.whole_error(qkv, *pair, **where)) for who, pair in outs.items()}
            what = f"{CHECK_LENGTH} tokens"
            self._errors[key] = max(
                oracle.check(error, case.dtype, f"{case.name}, {who}, {what}") for who, error in errors.items()
            )
        return self._errors[key]

    def baseline(self, case: Case) -> tuple[str, Callable[..., Array]]:
        """Dense attention to compare with: cuDNN's where it can, else this library's own."""
        if self.device.platform == "cuda":
            try:
                flash_cudnn.check_device(self.device, case.head_dim, jnp.dtype(case.dtype).itemsize)
            except NotImplementedError:
                pass
            else:
                attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
                return "jax.nn.dot_product_attention, cudnn", jax.jit(attend)
        name = self.choose(case)[0].name
        return f"dense_attention, {name}", functools.partial(dense_attention, implementation=name)

    def _skipping(self, qkv: Activations, calls: Calls) -> Callable[[], Array]:
        """The kernel with the threshold."""
        return functools.partial(calls.kernel, *qkv, calls.layout, skip_threshold=self.skip_threshold)

    def _times(self, case: Case, length: int, qkv: Activations, calls: Calls, baseline) -> dict[str, list[float]]:
        """Milliseconds of the baseline and of each call."""
        on_gpu = self.device.platform == "cuda"
        repeats = self.repeats or (8 if on_gpu and length < FEW_REPEATS_FROM else 3)
        of_baseline = self.baseline_repeats or (1 if on_gpu and length >= ONE_REPEAT_FROM else repeats)
        key = (*_shape(case), length)
        run: dict[str, tuple[int, Callable[[], Any]]] = {"kernel": (repeats, lambda: calls.kernel(*qkv, calls.layout))}
        if self.skip_threshold is not None:
            run["skip"] = (repeats, self._skipping(qkv, calls))
        for name, call in (("index", calls.index), ("mass", calls.mass)):
            if call is not None:
                run[name] = (repeats, functools.partial(call, *qkv[:2]))
        if key not in self._baselines:
            run["baseline"] = (of_baseline, lambda: baseline(*qkv))
        times = timed(run, in_turn=not on_gpu)
        if key in self._baselines:
            times["baseline"] = self._baselines[key]
        elif length >= BASELINE_ONCE_FROM:
            self._baselines[key] = times["baseline"]
        return times


def prepare(
    case: Case, length: int, entry: Implementation, tiles: TileConfig, qkv: Activations, *, estimated: bool
) -> Calls:
    """A case as calls.

    Args:
      case: what to compute. length: tokens.
      entry: implementation. tiles: its tile sizes.
      qkv: q [1, T, N, H], k and v [1, T, K, H].
      estimated: the kernel reads what the estimate finds in ``qkv``, not constructed lists.
    """
    pattern = case.sizes_at(length, tiles).pattern
    static: dict[str, Any] = {"entry": entry, "tiles": tiles, "scale": case.head_dim**-0.5}
    if isinstance(pattern, Dense):
        return Calls(functools.partial(_dense, **static), inputs.constructed_layout(case, length, tiles, 0), None, None)
    arrays, capacities = check_pattern(pattern, case.num_heads, length, None, None)
    how = {"capacities": capacities, "slash_granularity": case.slash_granularity}
    index = functools.partial(_index, pattern=arrays, **how, **static)
    if estimated or isinstance(pattern, AShape):  # an A-shape is the same whatever q and k are
        layout = index(qkv.q, qkv.k)
    else:
        layout = inputs.constructed_layout(case, length, tiles, capacities.num_columns)
    mass = functools.partial(_mass, **static) if isinstance(pattern, VerticalSlash) else None
    return Calls(functools.partial(_kernel, **static), layout, index, mass)


def _whole(q: Array) -> dict[str, Any]:
    return {"q_offset": jnp.zeros(1, jnp.int32), "kv_len": jnp.full(1, q.shape[1], jnp.int32)}


@functools.partial(jax.jit, static_argnames=("entry", "tiles", "scale", "skip_threshold"))
def _kernel(q, k, v, layout, *, entry, tiles, scale, skip_threshold=None) -> Array:
    how = {} if skip_threshold is None else {"skip_threshold": skip_threshold}
    return entry.sparse(q, k, v, layout, scale=scale, tiles=tiles, **how, **_whole(q))[0]


@functools.partial(jax.jit, static_argnames=("entry", "tiles", "scale", "skip_threshold"))
def _dense(q, k, v, layout, *, entry, tiles, scale, skip_threshold=None) -> Array:
    how = {} if skip_threshold is None else {"skip_threshold": skip_threshold}
    return entry.dense(q, k, v, scale=scale, tiles=tiles, **how, **_whole(q))[0]


@functools.partial(jax.jit, static_argnames=("entry", "tiles", "scale", "capacities", "slash_granularity"))
def _index(q, k, *, pattern, entry, tiles, scale, capacities, slash_granularity) -> SparseLayout:
    sizes = {"max_num_blocks": capacities.num_blocks, "max_num_columns": capacities.num_columns}
    how: dict[str, Any] = {
        "scale": scale,
        "tiles": tiles,
        "slash_granularity": slash_granularity,
        "kernels": entry.estimate,
    }
    return build_layout(q, k, pattern, **sizes, **how, **_whole(q))


@functools.partial(jax.jit, static_argnames=("entry", "tiles", "scale"))
def _mass(q, k, *, entry, tiles, scale) -> tuple[Array, Array]:
    rows, positions = estimate.last_queries(q, **_whole(q))
    return entry.estimate.attention_mass(rows, k, positions, scale=scale)


def timed(calls: dict[str, tuple[int, Callable[[], Any]]], *, in_turn: bool) -> dict[str, list[float]]:
    """Milliseconds of so many runs of each call.

    Args:
      calls: how often each is timed, and the call.
      in_turn: one run of each after another, after one that warms up: for CPUs, whose speed drifts. Else each call for
        itself, after ``WARM_SECONDS`` of it: a GPU runs slower after a call that took more power. There a run of a
        short call is several in a row, and its time their mean.
    """
    for _, call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    if in_turn:
        for i in range(max(repeats for repeats, _ in calls.values())):
            for name, (repeats, call) in calls.items():
                if i < repeats:
                    times[name].append(_milliseconds(call))
        return times
    for name, (repeats, call) in calls.items():
        end = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < end and repeats > 1:
            jax.block_until_ready(call())
        in_a_row = min(math.ceil(RUN_MILLISECONDS / _milliseconds(call)), MAX_CALLS) if repeats > 1 else 1
        times[name] = [_milliseconds(call, in_a_row) for _ in range(repeats)]
    return times


def _milliseconds(call: Callable[[], Any], in_a_row: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(in_a_row):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) * 1e3 / in_a_row


def _shape(case: Case) -> tuple:
    return case.num_heads, case.num_kv_heads, case.head_dim, case.dtype


def _described(case: Case, length: int, tiles: TileConfig, estimated: bool) -> dict[str, Any]:
    """The fields of a record that say what was measured."""
    sizes = case.sizes_at(length, tiles)
    has_slashes = isinstance(sizes.pattern, VerticalSlash | AShape)
    return {
        "suite": "attention",
        "case": case.name,
        "pattern": describe(sizes, tiles, constructed=not estimated),
        "slash_granularity": case.slash_granularity if has_slashes else None,
        "lists": "activations" if estimated else "constructed",
        "tiles": "x".join(map(str, dataclasses.astuple(tiles))),
        "length": length,
        "batch": 1,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
    }


def _figures(case: Case, length: int, times: dict[str, list[float]], share: float) -> dict[str, Any]:
    """The fields of a record that come from times and density."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    parts = [times[name] for name in ("index", "kernel") if name in times]
    total = sum(statistics.median(values) for values in parts)
    flops = 4 * case.head_dim * case.num_heads * length * (length + 1) / 2
    return {
        "density": share,
        "ms": total,
        "ms_spread": [sum(map(min, parts)), sum(map(max, parts))],
        "estimate_ms": middle.get("mass"),
        "index_ms": middle.get("index"),
        "kernel_ms": middle["kernel"],
        "skip_ms": middle.get("skip"),
        "baseline_ms": middle["baseline"],
        "ratio": total / middle["baseline"],
        "tflops_kept": flops * share / middle["kernel"] / 1e9,
        "tflops_baseline": flops / middle["baseline"] / 1e9,
    }

"""The attention suite: sparse against dense attention of one layer, estimate and layout included.

Random activations have no structure: an estimate on them finds scattered slashes that cover everything. So the estimate
and the layout are computed and timed, and the kernel then gets lists of a stated kind: a share of the slashes nearest,
the other slashes and the verticals at random.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minference_jax.attention import dense_attention
from minference_jax.bench.records import record
from minference_jax.estimate import FORCED_VERTICALS
from minference_jax.index import build_layout
from minference_jax.kernels import reference, sparse_xla
from minference_jax.kernels.layouts import FAR, SparseLayout, compact, density, layout_mask, slash_offsets
from minference_jax.kernels.tiles import TileConfig
from minference_jax.patterns import PatternArrays, VerticalSlash, uniform_patterns

CHECK_LENGTH = 1024
"""Tokens at which a case is checked against the oracle, whose memory is quadratic."""
TOLERANCE = 1e-4
"""Largest error allowed in float32, absolute; outputs are of order one."""
TILES = TileConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark case: the pattern of all heads and the share of its slashes that are the nearest ones."""

    local_share: float
    pattern: VerticalSlash
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64

    @property
    def name(self) -> str:
        """The pattern's sizes and the kind of lists."""
        sizes = f"{self.pattern.vertical_size}, {self.pattern.slash_size}"
        return f"VS({sizes}), {self.local_share:.0%} of slashes nearest"


PATTERN = VerticalSlash(vertical_size=500, slash_size=700)
CASES = (Case(local_share=1.0, pattern=PATTERN), Case(local_share=0.97, pattern=PATTERN))
LENGTHS = (4096, 8192, 16384, 32768)


def activations(case: Case, length: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random q [1, T, N, H], k, v [1, T, K, H], float32."""
    rng = np.random.default_rng(seed)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    q, k, v = (jnp.asarray(rng.standard_normal((1, length, n, case.head_dim), dtype=np.float32)) for n in heads)
    return q, k, v


def make_layout(case: Case, length: int, seed: int = 0) -> SparseLayout:
    """The lists of a case: the first keys and the nearest slashes, the others at random."""
    rng = np.random.default_rng(seed)
    verticals, slashes = np.zeros((2, 1, case.num_heads, length), bool)
    local = round(case.local_share * case.pattern.slash_size)
    verticals[..., :FORCED_VERTICALS] = slashes[..., :local] = True
    for n in range(case.num_heads):
        more = case.pattern.vertical_size - FORCED_VERTICALS, case.pattern.slash_size - local
        verticals[0, n, rng.choice(np.arange(FORCED_VERTICALS, length), more[0], replace=False)] = True
        slashes[0, n, rng.choice(np.arange(local, length), more[1], replace=False)] = True
    heads, tiles = (1, case.num_heads), -(-length // TILES.block_q)
    offsets, counts = slash_offsets(jnp.asarray(slashes), TILES)
    return SparseLayout(
        offsets=offsets,
        offset_counts=counts,
        columns=compact(jnp.asarray(verticals), length),
        column_counts=jnp.asarray(verticals.sum(-1), jnp.int32),
        windows=jnp.full(heads, FAR, jnp.int32),
        block_ids=jnp.full((*heads, tiles, 1), FAR, jnp.int32),
        block_counts=jnp.zeros((*heads, tiles), jnp.int32),
    )


def sparse_call(case: Case, length: int) -> tuple[Callable[..., Any], float]:
    """Estimate, layout and kernel of a case as one call of q, k, v, and its mean density at this length."""
    at, valid = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
    where: dict[str, Any] = {"q_offset": at, "kv_len": valid, "scale": case.head_dim**-0.5, "tiles": TILES}
    rows = uniform_patterns(1, case.num_heads, case.pattern).arrays()
    pattern = PatternArrays(*(jnp.asarray(x[0]) for x in rows))
    index = jax.jit(lambda q, k, pattern: build_layout(q, k, pattern, max_num_blocks=1, **where))
    kernel = jax.jit(lambda q, k, v, layout: sparse_xla.attention(q, k, v, layout, **where)[0])
    layout = make_layout(case, length)
    share = density(layout, at, valid, length, TILES)
    return lambda q, k, v: (index(q, k, pattern), kernel(q, k, v, layout)), float(share.mean())


def check(case: Case) -> float:
    """The largest error of the case's kernel against the oracle on the same pairs, at ``CHECK_LENGTH`` tokens.

    Raises:
      RuntimeError: the error is above ``TOLERANCE``.
    """
    q, k, v = activations(case, CHECK_LENGTH)
    scale = case.head_dim**-0.5
    small = dataclasses.replace(case, pattern=VerticalSlash(vertical_size=100, slash_size=140))
    layout = make_layout(small, CHECK_LENGTH)
    at, length = jnp.zeros(1, jnp.int32), jnp.full(1, CHECK_LENGTH, jnp.int32)
    out, _ = sparse_xla.attention(q, k, v, layout, scale=scale, q_offset=at, kv_len=length, tiles=TILES)
    mask = layout_mask(layout, at, length, CHECK_LENGTH, CHECK_LENGTH, TILES)
    causal = jnp.broadcast_to(jnp.tri(CHECK_LENGTH, dtype=bool), mask.shape)
    pairs = ((out, mask), (dense_attention(q, k, v), causal))
    errors = [jnp.abs(out - reference.attention(q, k, v, mask, scale=scale)[0]).max() for out, mask in pairs]
    error = float(jnp.stack(errors).max())
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"{case.name}: the error against the oracle is {error:.2e}, above {TOLERANCE}; no time is measured"
        )
    return error


def timed(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn after one run that warms up."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def run(lengths: tuple[int, ...] = LENGTHS, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Checks and times every case at every length; yields one record each, as soon as it is measured."""
    for case in CASES:
        error = check(case)
        for length in lengths:
            q, k, v = activations(case, length)
            sparse, share = sparse_call(case, length)
            dense = jax.jit(dense_attention)
            times = timed({"dense": lambda: dense(q, k, v), "sparse": lambda: sparse(q, k, v)}, repeats)  # noqa: B023
            middle = {name: statistics.median(values) for name, values in times.items()}
            flops = 4 * case.head_dim * case.num_heads * length * (length + 1) / 2 * share
            yield record(
                suite="attention",
                case=case.name,
                implementation="xla",
                length=length,
                batch=1,
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                dtype="float32",
                density=share,
                ms=middle["sparse"],
                ms_spread=[min(times["sparse"]), max(times["sparse"])],
                baseline="dense_attention, xla",
                baseline_ms=middle["dense"],
                ratio=middle["sparse"] / middle["dense"],
                tflops_kept=flops / middle["sparse"] / 1e9,
                error=error,
            )

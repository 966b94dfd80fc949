"""What prefill and answer will take of a device's memory, known before a weight is loaded or a prompt is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from minference_jax.cache import Plain, Quantised, policy_of
from minference_jax.generate import CompiledProgram, LanguageModel, compile_ahead
from minference_jax.measure import memory_limit

_CHUNK_SIZES = (65536, 16384, 4096)  # tokens: what a prefill that does not fit is tried with


class MemoryPlan(NamedTuple):
    """What a prefill takes, as the compiler has laid it out, and what there is.

    Attributes:
        programs: each that runs, one at a time.
        changed: arguments of `plan_memory` that these programs have in place of those that were asked for.
        weight_bytes: of the model's parameters, which every program needs.
        limit_bytes: what jax may use of the device; None = the device does not say.
    """

    programs: tuple[CompiledProgram, ...]
    changed: Mapping[str, Any]
    weight_bytes: int
    limit_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        """The most that is taken at a time."""
        return max(program.total_bytes for program in self.programs)

    @property
    def fits(self) -> bool:
        """Whether there is so much, as far as that is known."""
        return self.limit_bytes is None or self.needed_bytes <= self.limit_bytes


def plan_memory(
    model: LanguageModel,
    length: int,
    *,
    limit_bytes: int | None = None,
    changed: Mapping[str, Any] | None = None,
    **settings: Any,
) -> MemoryPlan:
    """Compiles for jax's default device what reads a prompt and what answers, runs nothing, and tells the memory.

    Args:
        model: may have shapes in place of weights, as `load_shapes` gives it.
        length: tokens of the prompt, of a batch those of its longest.
        limit_bytes: of memory; None = what jax may use of its default device.
        changed: arguments that take the place of those in `settings`.
        settings: batch, max_new_tokens, chunk_size, attention, pattern and others, as in `compile_ahead`.

    Raises:
        ValueError, NotImplementedError: as `compile_ahead`.
    """
    changed = dict(changed or {})
    programs = tuple(compile_ahead(model, [length], **{**settings, **changed}))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.split(model.model)[1]))
    return MemoryPlan(programs, changed, weights, memory_limit() if limit_bytes is None else limit_bytes)


def other_plans(
    model: LanguageModel, length: int, *, limit_bytes: int | None = None, **settings: Any
) -> Iterator[MemoryPlan]:
    """Plans with settings that take less, those first that change the answer least; ends with the first that fits.

    Args, raises: as `plan_memory`.
    """
    for changed in _changes(length, settings):
        plan = plan_memory(model, length, limit_bytes=limit_bytes, changed=changed, **settings)
        yield plan
        if plan.fits:
            return


def refusal(plan: MemoryPlan, others: list[MemoryPlan]) -> str:
    """In one sentence what a plan takes that does not fit, and which setting would.

    Args:
        plan: what was asked for.
        others: what `other_plans` gave.
    """
    largest = max(plan.programs, key=lambda program: program.total_bytes)
    said = (
        f"{largest.name} of {largest.batch} x {largest.length:,} tokens takes {gigabytes(plan.needed_bytes)}, "
        f"{gigabytes(plan.weight_bytes)} of them weights, and jax may use {gigabytes(plan.limit_bytes or 0)}"
    )
    if not others:
        return f"{said}: read a shorter prompt or fewer at once"
    least = min(others, key=lambda other: other.needed_bytes)
    has_chunks = any(program.name == "chunk" for program in plan.programs)
    given = {f"--{name.replace('_', '-')}": value for name, value in least.changed.items()}
    options = [f"{name} {value}" for name, value in given.items() if value is not None]
    options += [f"no {name}" for name, value in given.items() if value is None and has_chunks]
    how = " and ".join(options)
    if least.fits:
        return f"{said}: with {how} it takes {gigabytes(least.needed_bytes)}"
    return f"{said}; with {how}, the least that was tried, it takes {gigabytes(least.needed_bytes)}"


def gigabytes(count: int) -> str:
    """Bytes in units of 10^9."""
    return f"{count / 1e9:,.2f} GB"


def _changes(length: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    policy = policy_of(settings.get("kv_cache", "plain"))
    if not isinstance(policy, Plain | Quantised):  # which alone are filled in chunks
        return
    read_at_once = settings.get("chunk_size") or length
    chunk_sizes = [chunk_size for chunk_size in _CHUNK_SIZES if chunk_size < read_at_once]
    for chunk_size in chunk_sizes:
        yield {"chunk_size": chunk_size}
    if isinstance(policy, Plain):
        for asked_or_less in (settings.get("chunk_size"), *chunk_sizes):
            yield {"chunk_size": asked_or_less, "kv_cache": "int8"}
    yield {"chunk_size": None, "kv_cache": "snapkv"}

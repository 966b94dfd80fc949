"""Programs compiled ahead of time: what a prefill will run is ready before its prompt, and its memory is known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minference_jax.cache import AnyPolicy, Host, KVCache, init_cache, policy_of
from minference_jax.generate import chunks, programs
from minference_jax.generate.language_model import LanguageModel
from minference_jax.generate.prompts import bucket_length, check_room
from minference_jax.index import SlashGranularity
from minference_jax.patterns import HeadPattern, ModelPatterns


class CompiledProgram(NamedTuple):
    """A program and the device memory that it takes while it runs, as the compiler has laid it out.

    Attributes:
        name: "prefill", "chunk" (of a prefill in chunks) or "decode" (one token of each row).
        batch: rows.
        length: tokens of the bucket that it serves; of "decode" those that its cache has room for.
        seconds: that compiling took, or finding it in the persistent cache.
        argument_bytes: what goes in: weights, cache, tokens.
        output_bytes: what comes out and does not lie in the memory of an argument: cache, logits.
        temporary_bytes: activations and whatever else exists in between.
    """

    name: str
    batch: int
    length: int
    seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory that must be free for it, weights included."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes


def compile_ahead(
    model: LanguageModel,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    max_new_tokens: int = 0,
    chunk_size: int | None = None,
    attention: str = "minference",
    pattern: HeadPattern | ModelPatterns | None = None,
    slash_granularity: SlashGranularity = "line",
    implementation: str | None = None,
    kv_cache: str | AnyPolicy = "plain",
) -> Iterator[CompiledProgram]:
    """Compiles what `prefill` runs for prompts of these lengths, and what makes answers behind them; runs nothing.

    With `use_compilation_cache` before it, the same calls start at once, in this process and in later ones. Prompts
    whose lengths fall into one bucket share a program.

    Args:
        model: whose programs they are.
        lengths: tokens of prompts to come, of a batch its longest.
        batch: rows.
        max_new_tokens: most tokens of an answer; 0 = no program to make one.
        chunk_size, attention, pattern, slash_granularity, implementation, kv_cache: as in `LanguageModel.prefill`.

    Yields:
        Each program as soon as it is there: those that read prompts, then those that make tokens.

    Raises:
        ValueError, NotImplementedError: as `LanguageModel.prefill` and `LanguageModel.decode`, before anything is
            compiled; a cache in host memory, which is filled and read by other programs.
    """
    if not all(isinstance(number, int | np.integer) for number in (*lengths, batch, max_new_tokens)):
        raise ValueError(f"lengths={list(lengths)}, {batch=} and {max_new_tokens=} must be integers")
    if batch < 1 or max_new_tokens < 0:
        raise ValueError(f"{batch=} must be at least 1 and {max_new_tokens=} at least 0")
    if len(lengths) == 0 or min(lengths) < 1:
        raise ValueError(f"lengths={list(lengths)} must be one or more positive numbers of tokens")
    check_room(model.config, lengths, max_new_tokens)
    policy = policy_of(kv_cache)
    chunks.check_chunks(chunk_size, policy)
    if isinstance(policy, Host):
        raise NotImplementedError("kv_cache='host' runs layer by layer; its programs can't be compiled ahead")
    how = (attention, pattern, slash_granularity, implementation)
    prefills: dict[tuple[int, bool], Any] = {}  # by what tells their programs apart; of equal ones there is one
    for length in sorted(lengths):
        bucket, is_whole = bucket_length(length), chunk_size is None or length <= chunk_size
        prefills[bucket, is_whole] = model.choose(bucket, *how, is_whole)
    return _compiled(model, batch, chunk_size, prefills, max_new_tokens, policy)


def _compiled(model, batch, chunk_size, prefills, max_new_tokens, policy) -> Iterator[CompiledProgram]:
    graph, state = nnx.split(model.model)
    prompts: dict[int, Any] = {}  # what prefills leave behind, by the tokens that it has room for
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    for (bucket, is_whole), (attend, arrays) in prefills.items():
        if is_whole:
            tokens = jax.ShapeDtypeStruct((batch, bucket), jnp.int32)
            lowered = programs.prefill.lower(graph, state, tokens, rows, arrays, attend, policy)
        else:
            is_sparse = arrays is not None
            read = chunks.shapes_of_read(graph, state, batch, bucket, chunk_size, policy, is_sparse=is_sparse)
            lowered = chunks.lower_chunk(graph, state, arrays, _made(state, read), attend, chunk_size)
        prompts[chunks.capacity_of(bucket, None if is_whole else chunk_size)] = lowered.out_info.cache
        yield _compile(lowered, "prefill" if is_whole else "chunk", batch, bucket)
    if max_new_tokens > 1:  # the first token comes of the prefill's logits
        room = bucket_length(max_new_tokens - 1)
        for held, prompt in prompts.items():
            given = _made(state, (rows, prompt, _cache(model, batch, room)))
            yield _compile(programs.read_token.lower(graph, state, *given), "decode", batch, held + room)


def _cache(model: LanguageModel, batch: int, capacity: int) -> KVCache:
    """Shapes of a cache."""
    config = model.config
    sizes = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    return jax.eval_shape(lambda: init_cache(*sizes, model.model.dtype))


def _made(state: Any, shapes: Any) -> Any:
    """Shapes as those of what other programs have made of the model's arrays: a program's key depends on where."""
    leaf = jax.tree.leaves(state)[0]
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None  # of shapes alone there is no place
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _compile(lowered: Any, name: str, batch: int, length: int) -> CompiledProgram:
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - start
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = (memory.argument_size_in_bytes, outputs, memory.temp_size_in_bytes)
    return CompiledProgram(name, batch, length, seconds, *sizes)

"""`minference-jax compile`."""

from __future__ import annotations

import argparse
import math

from minference_jax.cli.inputs import choose_attention, load_model
from minference_jax.compilation import use_compilation_cache
from minference_jax.generate import CompiledProgram, compile_ahead
from minference_jax.measure import memory_limit

_SIZES = ("in, GB", "out, GB", "between", "all, GB")
HEADING = f"{'program':8} {'batch':>5} {'tokens':>10} {'seconds':>8} " + " ".join(f"{size:>8}" for size in _SIZES)


def run(arguments: argparse.Namespace) -> None:
    """Compiles into the cache, and prints for each program what it took and the memory that it will take.

    Raises:
        ValueError, NotImplementedError, OSError: as `compile_ahead` and `use_compilation_cache`.
        MemoryError: a program takes more memory than the device has; the others are compiled.
    """
    attention = choose_attention(arguments)
    folder = use_compilation_cache(arguments.compilation_cache or None)
    model = load_model(arguments)
    programs = compile_ahead(
        model,
        arguments.lengths,
        batch=arguments.batch,
        max_new_tokens=arguments.max_new_tokens,
        chunk_size=arguments.chunk_size,
        attention=attention.name,
        pattern=attention.pattern,
        slash_granularity=attention.slash_granularity,
        implementation=arguments.implementation,
        kv_cache=arguments.kv_cache,
    )
    limit, too_big = memory_limit() or math.inf, None
    print(HEADING)
    for program in programs:
        print(line(program), flush=True)
        if program.total_bytes > limit:
            too_big = too_big or program
    print(f"kept in {folder}")
    if too_big is not None:
        raise MemoryError(
            f"{too_big.name} of {too_big.batch} x {too_big.length} tokens takes {too_big.total_bytes / 1e9:.2f} GB, "
            f"jax may use {limit / 1e9:.2f} GB of this device: `minference-jax plan` finds what takes less"
        )


def line(program: CompiledProgram) -> str:
    """A row of the table; sizes in units of 10^9 bytes."""
    sizes = (program.argument_bytes, program.output_bytes, program.temporary_bytes, program.total_bytes)
    figures = " ".join(f"{size / 1e9:8.3f}" for size in sizes)
    return f"{program.name:8} {program.batch:5} {program.length:10,} {program.seconds:8.1f} {figures}"

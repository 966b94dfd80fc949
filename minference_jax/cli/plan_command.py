"""`minference-jax plan`."""

from __future__ import annotations

import argparse

from minference_jax.bench.shapes import SHAPES
from minference_jax.cli.compile_command import HEADING, line
from minference_jax.cli.inputs import check_pattern_option, choose_attention
from minference_jax.convert.hf_config import read_config
from minference_jax.generate import LanguageModel
from minference_jax.loading import choose_tiles, load_shapes
from minference_jax.measure import device_name
from minference_jax.models import abstract_model
from minference_jax.patterns.registry import resolve_patterns
from minference_jax.plan import gigabytes, other_plans, plan_memory, refusal

_DTYPE = "bfloat16"


def run(arguments: argparse.Namespace) -> None:
    """Prints the memory of each program, and whether the device has it.

    Raises:
        ValueError, NotImplementedError, OSError: as `load_shapes` and `compile_ahead`.
        MemoryError: it has not; the sentence names a setting with which it would.
    """
    attention = choose_attention(arguments)
    check_pattern_option(arguments)
    asked = {
        "limit_bytes": None if arguments.memory is None else int(arguments.memory * 1e9),
        "batch": arguments.batch,
        "max_new_tokens": arguments.max_new_tokens,
        "chunk_size": arguments.chunk_size,
        "kv_cache": arguments.kv_cache,
        "attention": attention.name,
        "pattern": attention.pattern,
        "slash_granularity": attention.slash_granularity,
        "implementation": arguments.implementation,
    }
    model = _model(arguments)
    plan = plan_memory(model, arguments.length, **asked)
    print(HEADING)
    for program in plan.programs:
        print(line(program))
    if not plan.fits:
        raise MemoryError(refusal(plan, list(other_plans(model, arguments.length, **asked))))
    known = "what there is is not known" if plan.limit_bytes is None else f"of {gigabytes(plan.limit_bytes)}"
    needed, weights = gigabytes(plan.needed_bytes), gigabytes(plan.weight_bytes)
    print(f"{needed} are needed on {device_name()}, {weights} of them for weights; {known}")


def _model(arguments: argparse.Namespace) -> LanguageModel:
    """The model, or one of that shape, without weights."""
    how = {"dtype": arguments.dtype or _DTYPE, "linear": arguments.linear}
    if arguments.model is not None:
        return load_shapes(arguments.model, patterns=arguments.pattern, tiles=arguments.tiles, **how)
    fields = SHAPES[arguments.shape]
    config, patterns = read_config(fields), None
    if arguments.pattern is not None:
        patterns = resolve_patterns(arguments.pattern, fields["_name_or_path"], fields).patterns
    return LanguageModel(abstract_model(config, **how), None, patterns, tiles=choose_tiles(arguments.tiles))

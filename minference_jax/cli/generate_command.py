"""`minference-jax generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax

from minference_jax.cache import policy_of
from minference_jax.cli.inputs import choose_attention, encode_prompt, load_model, model_name, read_prompt
from minference_jax.cli.progress import Steps, wants_bars
from minference_jax.generate.chunks import check_chunks
from minference_jax.generate.sampling import check_answer
from minference_jax.patterns.release import is_release


def run(arguments: argparse.Namespace) -> None:
    """Reads the prompt and prints the answer as it comes."""
    check_chunks(arguments.chunk_size, policy_of(arguments.kv_cache))
    attention, text, key = choose_attention(arguments), read_prompt(arguments), random_key(arguments)
    how = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")}
    check_answer(**how, key=key)
    if "" in arguments.stop:
        raise ValueError("--stop needs a text that is not empty")
    model = load_model(arguments)
    if attention.name in ("minference", "auto"):
        said = model.patterns.described_for(model_name(arguments))
        if said != model.patterns.source or (arguments.pattern is not None and is_release(arguments.pattern)):
            print(f"patterns: {said}", file=sys.stderr)
    prompt = encode_prompt(model, text, arguments)
    with Steps(1, wants_bars(arguments.progress)) as steps, steps.step(f"read {len(prompt.tokens)} tokens"):
        prefilled = model.prefill(
            prompt.tokens,
            attention=attention.name,
            pattern=attention.pattern,
            slash_granularity=attention.slash_granularity,
            implementation=arguments.implementation,
            chunk_size=arguments.chunk_size,
            kv_cache=arguments.kv_cache,
        )
        jax.block_until_ready(prefilled)
    pieces = model.stream(prefilled, **how, key=key)
    for piece in until_stop(pieces, arguments.stop):
        print(piece, end="", flush=True)
    print()


def random_key(arguments: argparse.Namespace) -> jax.Array | None:
    """The key of the random draws; None where the likeliest token is taken.

    Raises:
        ValueError: a seed that has no effect.
    """
    if arguments.temperature == 0:
        if arguments.seed is not None:
            raise ValueError("--seed has no effect at --temperature 0; give a temperature above 0")
        return None
    seed = 0 if arguments.seed is None else arguments.seed
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed {seed} must be between 0 and {2**31 - 1}")
    return jax.random.key(seed)


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of the pieces before the first stop text; what may be the start of one waits until it is clear.

    Args:
        pieces: text as it comes.
        stops: texts that end it, none of them empty.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [held.find(stop) for stop in stops if stop in held]
        if found:
            yield held[: min(found)]
            return
        starts = [size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size])]
        ready = len(held) - max(starts, default=0)
        yield held[:ready]
        held = held[ready:]
    yield held

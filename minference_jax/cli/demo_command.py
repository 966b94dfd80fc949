"""`minference-jax demo`: a page in the browser."""

from __future__ import annotations

import argparse
import os
import signal
import threading

from minference_jax.cli.inputs import check_granularity, choose_attention, load_model
from minference_jax.demo.models import Models, labels_of
from minference_jax.demo.runs import first_attention
from minference_jax.demo.server import check_address, check_extra, serving
from minference_jax.demo.service import Service
from minference_jax.demo.settings import Refused, Settings
from minference_jax.generate import LanguageModel
from minference_jax.implementations import named
from minference_jax.measure import SIZES
from minference_jax.measure.energy import open_counter

_MOST_TOKENS = 8192  # or twice the length from which sparse attention pays on the device


def run(arguments: argparse.Namespace) -> None:
    """Loads each model once, then serves until it is interrupted.

    Raises:
        ValueError, OSError: what the options ask for can't be had.
    """
    check_extra()
    check_address(arguments.host, arguments.port)
    named(arguments.implementation)
    _check_example(arguments.example_tokens, arguments.max_prompt_tokens)
    sources = labels_of(arguments.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed at the end, whoever ends it
    options = [arguments.pattern, arguments.slash_granularity, *(getattr(arguments, size) for size in SIZES)]
    is_open = arguments.attention is None and all(option is None for option in options)
    arguments.attention = arguments.attention or "minference"
    attention = choose_attention(arguments)

    def loader(source: str | None) -> LanguageModel:
        return load_model(argparse.Namespace(**{**vars(arguments), "model": source}))

    models = Models(sources, loader)
    for label in reversed(models.labels):  # each once, so that what can't be read is told now; the first one stays
        models.get(label).sparse_on_device(arguments.implementation)
    first = models.get(models.labels[0])
    settings = _settings(arguments, first)
    _check_example(arguments.example_tokens, settings.max_prompt_tokens)
    counter = open_counter(os.environ.get("CUDA_VISIBLE_DEVICES"))
    service = Service(settings, models, counter)
    example_tokens = arguments.example_tokens or settings.max_prompt_tokens // 2
    if is_open:
        attention = first_attention(first, example_tokens, settings.implementation)
    check_granularity(first, attention)
    where = {"host": arguments.host, "port": arguments.port}
    try:
        with serving(service, attention, example_tokens=example_tokens, **where) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except Refused as error:
        raise ValueError(f"{error} --example-tokens or --max-prompt-tokens is too small.") from None


def _check_example(asked: int | None, most: int | None) -> None:
    if asked is not None and most is not None and asked > most:
        raise ValueError(f"--example-tokens {asked} is more than the {most} tokens that the demo reads at most")


def _settings(arguments: argparse.Namespace, model: LanguageModel) -> Settings:
    sparse, _ = model.sparse_on_device(arguments.implementation)
    room = model.config.max_length - arguments.max_new_tokens
    asked = arguments.max_prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        raise ValueError(
            f"the model has room for {model.config.max_length} tokens: --max-prompt-tokens and "
            f"--max-new-tokens {arguments.max_new_tokens} together must not be more"
        )
    return Settings(
        max_prompt_tokens=min(max(_MOST_TOKENS, 2 * sparse.break_even), room) if asked is None else asked,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        max_queue=arguments.max_queue,
        implementation=arguments.implementation,
    )

"""`minference-jax demo`: a page in the browser."""

from __future__ import annotations

import argparse
import signal
import threading

from minference_jax.cli.inputs import choose_attention, load_model
from minference_jax.demo.energy import open_counter
from minference_jax.demo.models import Models, labels_of
from minference_jax.demo.server import check_extra, serving
from minference_jax.demo.service import Service
from minference_jax.demo.settings import Refused, Settings
from minference_jax.generate import LanguageModel

_MOST_TOKENS = 8192


def run(arguments: argparse.Namespace) -> None:
    """Loads the first model, then serves until it is interrupted.

    Raises:
        ValueError, OSError: what the options ask for can't be had.
    """
    check_extra()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed at the end, whoever ends it
    attention = choose_attention(arguments)

    def loader(source: str | None) -> LanguageModel:
        return load_model(argparse.Namespace(**{**vars(arguments), "model": source}))

    models = Models(labels_of(arguments.model), loader)
    first = models.get(models.labels[0])
    settings = _settings(arguments, first)
    service = Service(settings, models, open_counter())
    example_tokens = arguments.example_tokens or settings.max_prompt_tokens // 2
    if example_tokens > settings.max_prompt_tokens:
        raise ValueError(f"--example-tokens {example_tokens} is more than --max-prompt-tokens")
    options = {"example_tokens": example_tokens, "host": arguments.host, "port": arguments.port}
    try:
        with serving(service, attention, **options) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except Refused as error:
        raise ValueError(str(error)) from None


def _settings(arguments: argparse.Namespace, model: LanguageModel) -> Settings:
    room = model.config.max_length - arguments.max_new_tokens
    asked = arguments.max_prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        raise ValueError(
            f"the model has room for {model.config.max_length} tokens: --max-prompt-tokens and "
            f"--max-new-tokens {arguments.max_new_tokens} together must not be more"
        )
    return Settings(
        max_prompt_tokens=min(_MOST_TOKENS, room) if asked is None else asked,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        max_line=arguments.max_line,
        implementation=arguments.implementation,
    )

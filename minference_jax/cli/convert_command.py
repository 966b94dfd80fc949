"""`minference-jax convert`."""

from __future__ import annotations

import argparse

from minference_jax.cli.progress import ByteBars, wants_bars
from minference_jax.convert.checkpoint import convert_model
from minference_jax.convert.hf_tokenizer import import_transformers


def run(arguments: argparse.Namespace) -> None:
    """Converts and says where the checkpoint is."""
    import_transformers().logging.set_verbosity_error()
    with ByteBars(wants_bars(arguments.progress)) as progress:
        destination = convert_model(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            patterns=arguments.patterns,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(f"{arguments.source} is now the checkpoint {destination}")

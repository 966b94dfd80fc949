"""`minference-jax export`."""

from __future__ import annotations

import argparse

from minference_jax.cli.progress import ByteBars, Throughput, wants_bars
from minference_jax.convert.export import export_model


def run(arguments: argparse.Namespace) -> None:
    """Exports and says where the folder is and how long it took."""
    with ByteBars(wants_bars(arguments.progress)) as bars:
        progress = Throughput(bars)
        destination = export_model(
            arguments.checkpoint, arguments.destination, dtype=arguments.dtype, progress=progress
        )
    print(f"{arguments.checkpoint} is now the Hugging Face folder {destination}: {progress}")

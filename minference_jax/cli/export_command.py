"""`minference-jax export`."""

from __future__ import annotations

import argparse
import sys

from minference_jax.cli.progress import ByteBars, Throughput, wants_bars
from minference_jax.convert.export import export_model


def run(arguments: argparse.Namespace) -> None:
    """Exports and says where the folder is and how long it took."""
    with ByteBars(wants_bars(arguments.progress)) as bars:
        progress = Throughput(bars)
        try:
            destination = export_model(
                arguments.checkpoint, arguments.destination, dtype=arguments.dtype, progress=progress
            )
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            raise
    print(f"{arguments.checkpoint} is now the Hugging Face folder {destination}: {progress}")

"""`minference-jax bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minference_jax.bench import attention
from minference_jax.bench.records import append


def run(arguments: argparse.Namespace) -> None:
    """Prints each record as a JSON line as soon as it is measured, and appends it to the file where one is named."""
    for record in attention.run(tuple(arguments.lengths or attention.LENGTHS), arguments.repeats):
        print(json.dumps(record), flush=True)
        if arguments.output is not None:
            append(Path(arguments.output), record)

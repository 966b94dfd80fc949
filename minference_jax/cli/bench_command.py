"""`minference-jax bench attention`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minference_jax.bench.attention import Bench
from minference_jax.bench.inputs import read_activations
from minference_jax.bench.oracle import WrongResult
from minference_jax.bench.records import append
from minference_jax.cli.outputs import records_file
from minference_jax.kernels.tiles import tiles_of


def run(arguments: argparse.Namespace) -> None:
    """Prints each record as a JSON line as soon as it is measured, and appends it to the file where one is named.

    What does not fit the device or is wrong is said in one sentence each, and the other cases go on.

    Raises:
      ValueError, NotImplementedError, OSError: what the options ask for can't be had.
      SystemExit: with code 1, where there was any of that.
    """
    output = records_file(arguments.output)
    bench = Bench(
        implementation=arguments.implementation,
        tiles=None if arguments.tiles is None else tiles_of(*arguments.tiles),
        repeats=arguments.repeats,
        baseline_repeats=arguments.baseline_repeats,
        activations=None if arguments.activations is None else read_activations(Path(arguments.activations)),
        skip_threshold=arguments.skip_threshold,
    )
    failed = False
    for case, length in bench.plan(arguments.cases, arguments.lengths):
        try:
            record = bench.measure(case, length)
        except (MemoryError, WrongResult) as error:
            failed = True
            print(f"minference-jax: error: {error}", file=sys.stderr, flush=True)
            continue
        print(json.dumps(record), flush=True)
        if output is not None:
            append(output, record)
    if failed:
        raise SystemExit(1)

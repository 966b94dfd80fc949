"""`minference-jax autotune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minference_jax.bench.autotune import Trial, autotune, describe
from minference_jax.bench.oracle import WrongResult
from minference_jax.loading import default_tiles_file
from minference_jax.tile_table import TileEntry, TileTable, read_tiles, write_tiles


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each choice as soon as it is measured, and adds the fastest to the file.

    Raises:
        ValueError: options that do not fit each other, a file that is damaged or something else, or sizes that the
            device has by rule and that give a wrong result.
        NotImplementedError: the implementation can't run here.
        MemoryError: it does not fit the device.
        OSError: the file can't be read or written.
    """
    path = default_tiles_file() if arguments.output is None else Path(arguments.output)
    _stored(path)  # what can't be added to should be said before minutes of measurements
    names = ("implementation", "head_dim", "dtype", "num_heads", "num_kv_heads", "length", "repeats")
    try:
        for found in autotune(**{name: getattr(arguments, name) for name in names}):
            print(line(found), flush=True)
    except WrongResult as error:
        raise ValueError(str(error)) from error
    if isinstance(found, TileEntry):
        write_tiles(path, _stored(path).with_entry(found))
        print(f"stored in {path}")


def line(found: Trial | TileEntry) -> str:
    """What is known of one choice, or which was made."""
    if isinstance(found, TileEntry):
        what = f"{found.implementation} on {found.device}, {found.key}"
        times = f"{found.measured_ms:.3f} ms; by rule {found.heuristic_ms:.3f} ms"
        return f"{what}: {describe(found.tiles)}, {times}"
    name = f"{describe(found.tiles):30}"
    if found.ms is None:
        return f"{name} left out: {found.reason}"
    timed = f"{name} {found.ms:10.3f} ms, error {found.error:.1e}"
    return f"{timed}, by rule" if found.default_ms is None else f"{timed}, {found.share:.3f} of the time by rule"


def _stored(path: Path) -> TileTable:
    return read_tiles(path) if path.exists() else TileTable()

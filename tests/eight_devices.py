"""Loads folders onto a mesh of eight CPU devices, in a process of its own; prints what came of it as JSON.

Arguments: pairs of a name and a folder or checkpoint. A name that begins with "parts" is loaded in parts of few rows,
one that begins with "float16" in that dtype.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from family_folders import parameters
from jax.sharding import Mesh

from minference_jax.convert import placement
from minference_jax.convert.checkpoint import load_config, load_parameters
from minference_jax.convert.hf_folder import HuggingFaceFolder
from minference_jax.convert.store import TensorStore
from minference_jax.models.partition import parameter_shardings

PART_BYTES = 600
WHOLE = placement.PART_BYTES


def load(name: str, path: Path, mesh: Mesh, counts: dict[str, Counter]) -> dict[str, Any]:
    """Facts about one loading."""
    counts.clear()
    placement.PART_BYTES = PART_BYTES if name.startswith("parts") else WHOLE
    try:
        config, arrays = load_parameters(path, mesh=mesh, dtype="float16" if name.startswith("float16") else None)
    except ValueError as error:
        return {"refused": str(error)}
    shardings, expected = parameter_shardings(config, mesh), parameters(json.loads((path / "config.json").read_text()))
    facts: dict[str, Any] = {
        "read": {tensor: sorted(rows.items()) for tensor, rows in counts.items()},
        "wrong_shardings": [name for name, array in arrays.items() if array.sharding != shardings[name]],
        "wrong_names": sorted(arrays.keys() ^ expected.keys()),
        "wrong_values": [name for name in arrays if not np.array_equal(np.asarray(arrays[name]), expected[name])],
        "specs": {name: [*array.sharding.spec] for name, array in arrays.items()},
        "shapes_on_a_device": {name: array.addressable_shards[0].data.shape for name, array in arrays.items()},
    }
    assert config == load_config(path)
    return facts


def main(pairs: list[str]) -> None:
    """Loads all of them."""
    counts: dict[str, Counter] = {}
    read_rows, read_store = HuggingFaceFolder.read, TensorStore.read

    def counted_rows(self: HuggingFaceFolder, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        array = read_rows(self, name, start, stop)
        counts.setdefault(name, Counter()).update(range(start, start + len(array)))
        return array

    def counted_store(self: TensorStore, keys: list[str]) -> dict[str, np.ndarray]:
        for key in keys:
            counts.setdefault(key, Counter()).update([0])
        return read_store(self, keys)

    HuggingFaceFolder.read, TensorStore.read = counted_rows, counted_store  # type: ignore[method-assign]
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    named = dict(zip(pairs[::2], pairs[1::2], strict=True))
    print(json.dumps({name: load(name, Path(path), mesh, counts) for name, path in named.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])

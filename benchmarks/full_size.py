"""Writes a Hugging Face folder of true size with random weights, converts, loads and prefills it.

python -P benchmarks/full_size.py llama3-8b FOLDER --length 32768 appends to benchmarks/results/full_size.jsonl. FOLDER
gets the weights and the checkpoint, 32 GB for 8B parameters; --layers keeps fewer. Random weights have no structure:
lists of sparse heads are estimated, but times of real prompts may differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from minference_jax import VerticalSlash, load
from minference_jax.bench.records import append, peak_bytes, record
from minference_jax.bench.shapes import SHAPES
from minference_jax.convert.checkpoint import convert_model
from minference_jax.convert.hf_config import read_config
from minference_jax.convert.hf_names import hf_shape, hf_tensors

RESULTS = Path(__file__).parent / "results" / "full_size.jsonl"
SHARD_BYTES = 2**31


def write_folder(folder: Path, fields: dict[str, Any]) -> None:
    """A sharded bfloat16 folder of the shapes that a config asks for."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**22 - 1)).astype(ml_dtypes.bfloat16)
    places: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for tensor, parts in hf_tensors(read_config(fields)).items():
        shape = hf_shape(parts)
        scale = tensor.endswith("norm.weight")
        shard[tensor] = np.ones(shape, noise.dtype) if scale else np.resize(noise, shape)
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def main() -> None:
    """Writes, converts, loads and prefills, and records each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    fields = dict(SHAPES[options.model])
    fields["num_hidden_layers"] = options.layers or fields["num_hidden_layers"]
    config = read_config(fields)
    shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    shape |= {"dtype": "bfloat16"}
    case = f"{options.model}, {fields['num_hidden_layers']} layers"

    def timed(step: str, run: Callable[[], Any], **measured: Any) -> Any:
        begin = time.perf_counter()
        out = jax.block_until_ready(run())
        seconds = time.perf_counter() - begin
        print(f"{case}, {step}: {seconds:.2f} s", flush=True)
        density = getattr(out, "density", None)
        measured |= {"density": None if density is None else float(density.mean()), "peak_bytes": peak_bytes()}
        append(RESULTS, record(suite="full_size", case=f"{case}, {step}", ms=1e3 * seconds, **shape, **measured))
        return out

    timed("write", lambda: write_folder(options.folder / "hf", fields))
    timed("convert", lambda: convert_model(options.folder / "hf", options.folder / "checkpoint"))
    model = timed("load", lambda: load(options.folder / "checkpoint"))
    prompt = np.random.default_rng(1).integers(0, fields["vocab_size"], options.length)
    pattern = VerticalSlash(vertical_size=1000, slash_size=600)
    for attention, sizes in (("dense", None), ("vertical_slash", pattern)):
        for run in range(options.repeats + 1):
            name = f"{attention}, {'compile and run' if run == 0 else f'run {run}'}"
            read = timed(
                f"prefill {name}",
                lambda attention=attention, sizes=sizes: model.prefill(prompt, attention=attention, pattern=sizes),
                length=options.length,
                batch=1,
                pattern=None if sizes is None else str(sizes),
            )
        if not np.isfinite(np.asarray(read.logits)).all():
            raise SystemExit(f"{case}, {attention}: logits are not finite")


if __name__ == "__main__":
    main()

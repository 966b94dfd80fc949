"""Compares every family and switch with transformers' PyTorch models, and converts each there and back. Needs torch.

python -P benchmarks/model_parity.py appends one record for each case to benchmarks/results/models.jsonl.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "goldens"))

import reference
from goldens import families, tiny_models

from minference_jax.bench.records import append, record
from minference_jax.cache import init_cache
from minference_jax.convert.checkpoint import convert_model, load_parameters
from minference_jax.convert.export import export_model, hf_array
from minference_jax.convert.hf_names import hf_tensors
from minference_jax.models import DecoderConfig, from_parameters


def parity(name: str, config: DecoderConfig, parameters: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of logits over the largest logit, and the name of PyTorch's class."""
    if name in families.CASES:
        theirs = reference.build_family(families.CASES[name], config, parameters)
    else:
        theirs = reference.build(config, parameters)
    prompt = tiny_models.tiny_prompt(config)
    expected, _ = reference.logits_and_greedy(theirs, prompt, 1)
    model = from_parameters(config, parameters)
    cache = init_cache(config.num_layers, 1, len(prompt), config.num_kv_heads, config.head_dim, model.dtype)
    logits, _, _ = model(jax.numpy.asarray(prompt)[None], cache, logits="all")
    return float(np.abs(np.asarray(logits[0]) - expected).max() / np.abs(expected).max()), type(theirs).__name__


def round_trip(fields: dict, config: DecoderConfig, parameters: dict[str, np.ndarray]) -> bool:
    """Whether Hugging Face folder -> checkpoint -> Hugging Face folder -> parameters changes no bit."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(fields))
        tensors = {
            name: hf_array(parts, lambda part: parameters[part.name][() if part.layer is None else part.layer])
            for name, parts in hf_tensors(config).items()
        }
        save_file(tensors, source / "model.safetensors")
        checkpoint = convert_model(source, Path(folder) / "checkpoint")
        _, back = load_parameters(export_model(checkpoint, Path(folder) / "exported"))
    return all(np.array_equal(parameters[name], np.asarray(array)) for name, array in back.items())


def main() -> None:
    """Measures and records every case."""
    results = Path(__file__).parent / "results" / "models.jsonl"
    for name in (*tiny_models.CASES, *families.CASES):
        config = families.our_config(name) if name in families.CASES else tiny_models.CASES[name]
        parameters = tiny_models.tiny_parameters(config)
        error, baseline = parity(name, config, parameters)
        if name in families.CASES and not round_trip(families.CASES[name], config, parameters):
            raise SystemExit(f"{name}: a conversion there and back changes the weights")
        sizes = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        measured = {"suite": "models", "case": name, "dtype": "float32", "length": tiny_models.PROMPT_LENGTH}
        append(results, record(**measured, **sizes, batch=1, baseline=f"transformers, {baseline}", error=error))
        print(f"{name}: {error:.1e} of {baseline}")


if __name__ == "__main__":
    main()

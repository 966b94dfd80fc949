"""Saves q, k and v of a model's layers on a text, for ``minference-jax bench attention --activations``."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import minference_jax
from minference_jax.cache import init_cache

TEXT = Path(__file__).parent.parent / "examples" / "persuasion.txt"


def attend_and_keep(q, k, v, layer_input, *, scale, q_offset, kv_len):
    """Dense attention of a whole prompt that also gives its q, k and v, float16, after position embedding."""
    out = minference_jax.dense_attention(q, k, v, scale=scale, kv_len=kv_len)
    return out, tuple(x[0].astype(jnp.float16) for x in (q, k, v))


def captured(model, tokens, layers: list[int]) -> list[dict[str, np.ndarray]]:
    """q [T, N, H], k and v [T, K, H], float16, of each of these layers.

    Args:
        model: a model such as ``minference_jax.load().model``.
        tokens: ids of one prompt, T of them.
        layers: from 0 on.
    """
    config = model.config
    cache = init_cache(config.num_layers, 1, len(tokens), config.num_kv_heads, config.head_dim, model.dtype)
    run = jax.jit(lambda ids: model(ids, cache, attend=attend_and_keep)[2])
    kept = run(jnp.asarray(tokens, jnp.int32)[None])
    return [{name: np.asarray(x[layer]) for name, x in zip("qkv", kept, strict=True)} for layer in layers]


def save(arguments: argparse.Namespace) -> list[Path]:
    """Writes one file for each layer into the folder and gives their paths."""
    loaded = minference_jax.load(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    tokens = loaded.encode(text)[: arguments.tokens or loaded.config.max_length]
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"layer_{layer:02}.npz" for layer in arguments.layers]
    for path, arrays in zip(paths, captured(loaded.model, tokens, arguments.layers), strict=True):
        np.savez(path, **arrays)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where layer_NN.npz files go")
    parser.add_argument("--model", help="as of minference-jax; without it the default one")
    parser.add_argument("--text", default=str(TEXT), help="a file (examples/persuasion.txt)")
    parser.add_argument(
        "--tokens", type=int, help="of the text's beginning; without it all, or what the model can read"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 20], help="from 0 on (2 10 20)")
    for path in save(parser.parse_args()):
        print(path)

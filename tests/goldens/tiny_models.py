"""Tiny models whose weights both sides of a comparison build from the same numpy seeds. Needs numpy and our package."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from minference_jax.models import DecoderConfig, LlamaConfig, RopeConfig, parameter_shapes

FOLDER = Path(__file__).parent
NEW_TOKENS = 64
PROMPT_LENGTH = 24


def _config(**changes) -> LlamaConfig:
    base = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**(base | changes))


CASES: dict[str, LlamaConfig] = {
    "default_untied": _config(),
    "tied": _config(tie_embeddings=True),
    "one_kv_head": _config(num_kv_heads=1),
    "as_many_kv_heads": _config(num_kv_heads=4),
    "wide_heads": _config(head_dim=20),
    "attention_bias": _config(qkv_bias=True, o_bias=True),
    "qkv_bias": _config(qkv_bias=True),  # what Qwen2 has
    "mlp_bias": _config(mlp_bias=True, tie_embeddings=True),
    "linear": _config(rope=RopeConfig(rope_type="linear", factor=3.0)),
    "dynamic_crossing": _config(rope=RopeConfig(rope_type="dynamic", factor=4.0), max_position_embeddings=48),
    "dynamic_long": _config(rope=RopeConfig(rope_type="dynamic", factor=8.0), max_position_embeddings=16),
    "llama3": _config(
        head_dim=16,
        rope=RopeConfig(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": _config(
        head_dim=16,
        rope=RopeConfig(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=96),
    ),
    "yarn_every_field": _config(
        head_dim=16,
        rope=RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "yarn_attention_factor": _config(
        rope=RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5)
    ),
}


def tiny_parameters(config: DecoderConfig) -> dict[str, np.ndarray]:
    """float32 parameters by our names; each depends on its name and shape alone."""
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("scale"):
            parameters[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            parameters[name] = 0.3 * noise
        elif name == "embed.embedding":
            parameters[name] = noise
        else:
            parameters[name] = noise * np.float32(1.5 / np.sqrt(shape[-2]))
    return parameters


def tiny_prompt(config: DecoderConfig) -> np.ndarray:
    """int32 [PROMPT_LENGTH]."""
    return np.random.default_rng(7).integers(0, config.vocab_size, PROMPT_LENGTH).astype(np.int32)


def read_golden(name: str) -> tuple[np.ndarray, list[int]]:
    """Logits float32 [PROMPT_LENGTH, V] and the greedy tokens of one case, as committed."""
    logits = np.load(FOLDER / "tiny_logits.npz")[name]
    return logits, json.loads((FOLDER / "tiny_tokens.json").read_text())[name]

"""A LLaMA as a GLM-4 that computes the same: real weights on GLM's code path. It is no trained GLM.

Heads of d become heads of 2 d of which half turns: q and k fill that half, in interleaved order, and zeros the rest; v
and the rows of o_proj are filled up with zeros; q is scaled by sqrt(2), because scores are divided by sqrt(2 d).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from minference_jax.convert.export import hf_array
from minference_jax.convert.hf_names import hf_tensors
from minference_jax.models import GlmConfig, LlamaConfig, RopeConfig


def glm_config(config: LlamaConfig) -> GlmConfig:
    """The config of the GLM that a LLaMA without biases and rope scaling becomes."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for switch in ("qkv_bias", "o_bias", "mlp_bias"):
        assert not sizes.pop(switch)
    rope = RopeConfig(rope_theta=config.rope.rope_theta, partial_rotary_factor=0.5, interleaved=True)
    return GlmConfig(**sizes | {"head_dim": 2 * config.head_dim, "rope": rope})


def glm_parameters(config: LlamaConfig, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of that GLM, float32."""
    size = config.head_dim
    order = np.arange(size).reshape(2, -1).T.ravel()  # i beside i + size / 2
    out = {name: np.asarray(array) for name, array in parameters.items()}
    for letter in "qkv":
        name = f"layers.attention.{letter}_proj"
        heads = out[f"{name}.kernel"].reshape(*out[f"{name}.kernel"].shape[:2], -1, size)
        heads = heads if letter == "v" else heads[..., order]
        heads = heads * np.float32(2**0.5) if letter == "q" else heads
        wide = np.concatenate([heads, np.zeros_like(heads)], axis=-1)
        out[f"{name}.kernel"] = wide.reshape(*wide.shape[:2], -1)
        out[f"{name}.bias"] = np.zeros((wide.shape[0], out[f"{name}.kernel"].shape[2]), np.float32)
    rows = out["layers.attention.o_proj.kernel"]
    rows = rows.reshape(rows.shape[0], -1, size, rows.shape[2])
    wide = np.concatenate([rows, np.zeros_like(rows)], axis=2)
    out["layers.attention.o_proj.kernel"] = wide.reshape(wide.shape[0], -1, wide.shape[3])
    return out


def write_glm_folder(folder: Path, config: LlamaConfig, parameters: dict[str, np.ndarray], tokenizer: Any) -> Path:
    """That GLM as a Hugging Face folder."""
    ours, arrays = glm_config(config), glm_parameters(config, parameters)
    tensors = {
        name: hf_array(parts, lambda part: arrays[part.name] if part.layer is None else arrays[part.name][part.layer])
        for name, parts in hf_tensors(ours).items()
    }
    fields = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_dim,
        "partial_rotary_factor": ours.rope.partial_rotary_factor,
        "rope_theta": ours.rope.rope_theta,
        "rms_norm_eps": ours.rms_norm_eps,
        "max_position_embeddings": ours.max_position_embeddings,
        "tie_word_embeddings": ours.tie_embeddings,
        "attention_bias": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save_pretrained(str(folder))
    return folder

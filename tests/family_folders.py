"""Hugging Face folders of the tiny models of every family, their weights in that family's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from goldens import families, tiny_models
from safetensors.numpy import save_file

from minference_jax.convert.hf_config import read_config

LLAMA: dict[str, Any] = families.CASES["qwen2"] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA = {name: value for name, value in LLAMA.items() if "sliding" not in name}
CASES: dict[str, dict[str, Any]] = {"llama": LLAMA, **families.CASES}

_TOP = {
    "model.embed_tokens": "embed.embedding",
    "model.norm": "final_norm.scale",
    "lm_head": "lm_head.kernel",
}
_LAYER = {
    "input_layernorm.weight": "input_norm.scale",
    "post_attention_layernorm.weight": "post_attention_norm.scale",
    "post_self_attn_layernorm.weight": "attention_output_norm.scale",
    "post_mlp_layernorm.weight": "mlp_output_norm.scale",
    "self_attn.q_norm.weight": "attention.q_norm.scale",
    "self_attn.k_norm.weight": "attention.k_norm.scale",
}
_FUSED = {
    "phi3": {"self_attn.qkv_proj": [f"attention.{letter}_proj" for letter in "qkv"]},
    "glm": {},
    "glm4": {},
}
_GATE_UP = {"mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}
_PLAIN = {f"self_attn.{letter}_proj": [f"attention.{letter}_proj"] for letter in "qkvo"}
_PLAIN |= {f"mlp.{name}_proj": [f"mlp.{name}_proj"] for name in ("gate", "up", "down")}


def parameters(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ours, stacked, float32."""
    return tiny_models.tiny_parameters(read_config(fields))


def hf_weights(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same under Hugging Face's names, fused where the family fuses them; written down apart from the converter."""
    ours = parameters(fields)
    out = {f"{theirs}.weight": _turned(ours, name) for theirs, name in _TOP.items() if name in ours}
    fused = {**_GATE_UP, **_FUSED[fields["model_type"]]} if fields["model_type"] in _FUSED else {}
    parts = fused | {
        theirs: names for theirs, names in _PLAIN.items() if not any(names[0] in several for several in fused.values())
    }
    for layer in range(fields["num_hidden_layers"]):
        for theirs, name in _LAYER.items():
            if f"layers.{name}" in ours:
                out[f"model.layers.{layer}.{theirs}"] = ours[f"layers.{name}"][layer]
        for theirs, names in parts.items():
            for kind, suffix in (("kernel", "weight"), ("bias", "bias")):
                arrays = [
                    _turned(ours, f"layers.{name}.{kind}", layer) for name in names if f"layers.{name}.{kind}" in ours
                ]
                if arrays:
                    out[f"model.layers.{layer}.{theirs}.{suffix}"] = np.concatenate(arrays)
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def _turned(ours: dict[str, np.ndarray], name: str, layer: int | None = None) -> np.ndarray:
    array = ours[name] if layer is None else ours[name][layer]
    return array.T if name.endswith("kernel") else array


def write_family(folder: Path, fields: dict[str, Any], *, shards: int = 1, dtype: Any = np.float32) -> Path:
    """A sharded folder of a model, without a tokenizer.

    Args:
        folder: made if need be.
        fields: content of config.json, one of `CASES` or like them.
        shards: how many files of weights; 1 = one without an index.
        dtype: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    weights = {name: array.astype(dtype) for name, array in hf_weights(fields).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    places = {name: files[index % shards] for index, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in places if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder

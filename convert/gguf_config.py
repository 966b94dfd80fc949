"""The metadata of a GGUF file as the content of a Hugging Face config.json, strictly.

Source: the metadata keys of the GGUF specification and llama.cpp's conversion, for the architectures llama (which
llama.cpp also uses for Mistral, Yi and SmolLM2) and qwen2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minference_jax.convert.gguf_file import GGUFFile
from minference_jax.convert.weight_source import TensorInfo

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}

_READ: dict[str, type | tuple[type, ...]] = {  # what is read, and its type
    **dict.fromkeys(_SIZES, int),
    "vocab_size": int,
    "attention.head_count_kv": int,
    "attention.layer_norm_rms_epsilon": float,
    "attention.key_length": int,
    "attention.value_length": int,
    "rope.dimension_count": int,
    "rope.freq_base": float,
    "rope.scaling.type": str,
    "rope.scaling.factor": float,
    "rope.scaling.original_context_length": int,
    "rope.scaling.finetuned": bool,  # whether the model was trained further; the computation is the same
    "rope.scale_linear": float,
}

# Keys that change the result, with the only values that are honoured; a missing key is one of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # how q and k rows are ordered: pairs interleaved, as here
}

ROPE_FACTORS = "rope_freqs.weight"

# Llama 3.1 and 3.2: the file holds the factors that these settings give instead of the settings.
_LLAMA3_SETTINGS: list[dict[str, Any]] = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]


def read_metadata(file: GGUFFile, architecture: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The file's metadata as the content of a config.json.

    Args:
        file: a whole model.
        architecture: of the file, one of ARCHITECTURES.
        tensors: under Hugging Face's names; which of them there are says whether embeddings are tied and biases used.

    Raises:
        ValueError: names every key that is missing, unknown, or has a value that can't be honoured.
    """
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    faults = [
        f"{architecture}.{key} is not a key this converter knows" for key in own.keys() - _READ.keys() - _FIXED.keys()
    ]
    faults += [
        f"{architecture}.{key}={own[key]!r} is not supported, only {allowed[0]!r}"
        for key, allowed in _FIXED.items()
        if key in own and own[key] not in allowed
    ]
    needed = (*_SIZES, "attention.layer_norm_rms_epsilon")
    faults += [f"{architecture}.{key} is missing" for key in needed if key not in own]
    faults += [
        f"{architecture}.{key} differs between layers, which is not supported"
        for key in (*_SIZES, "attention.head_count_kv")
        if isinstance(own.get(key), np.ndarray)
    ]
    if not faults:
        file.check_types({f"{architecture}.{key}": kind for key, kind in _READ.items()})
        faults += [f"{architecture}.{key}={own[key]} must be positive" for key in _SIZES if own[key] < 1]
    if not faults:
        faults += _check_head_dim(own, architecture)
    if faults:
        raise ValueError(f"{file.name}: " + "; ".join(sorted(faults)))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **{theirs: own[key] for key, theirs in _SIZES.items()},
        "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
        "head_dim": _head_dim(own),
        "vocab_size": own.get("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", []))),
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "rope_parameters": _read_rope(file, own),
    }
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    return config | _token_ids(file.metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens; where the end of a turn has a token of its own, both stop."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    stops = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    found = {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    found["eos_token_id"] = stops if len(stops) > 1 else (stops or [None])[0]
    return {name: value for name, value in found.items() if value is not None}


def _head_dim(own: Mapping[str, Any]) -> int:
    return own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])


def _check_head_dim(own: Mapping[str, Any], architecture: str) -> list[str]:
    head_dim = _head_dim(own)
    return [
        f"{architecture}.{key}={own[key]} is not supported, only the head dimension {head_dim}"
        for key in ("attention.value_length", "rope.dimension_count")
        if own.get(key, head_dim) != head_dim
    ]


def _read_rope(file: GGUFFile, own: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _decimal(own.get("rope.freq_base", 10000.0)), "rope_type": "default"}
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear"))  # the latter in older files
    kind = own.get("rope.scaling.type", "none" if factor is None else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.name}: rope.scaling.type={kind!r} is not supported: none, linear or yarn")
    if kind != "none" and not factor:
        raise ValueError(f"{file.name}: rope.scaling.type={kind!r} needs rope.scaling.factor, got {factor!r}")
    if kind != "none" and factor != 1:
        rope |= {"rope_type": kind, "factor": _decimal(factor)}
        if kind == "yarn":
            if "rope.scaling.original_context_length" not in own:
                raise ValueError(f"{file.name}: yarn needs rope.scaling.original_context_length")
            rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    if ROPE_FACTORS not in file.tensors:
        return rope
    if rope["rope_type"] != "default":
        raise ValueError(f"{file.name} has both {ROPE_FACTORS} and rope.scaling.type={kind!r}")
    return rope | _match_rope_factors(file, rope["rope_theta"], _head_dim(own))


def _match_rope_factors(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings whose factors a file holds: of each pair, how much slower it turns than without scaling."""
    factors = file.read(ROPE_FACTORS).astype(np.float64).ravel()
    turns = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # per token
    for settings in _LLAMA3_SETTINGS:
        rotations = settings["original_max_position_embeddings"] * turns
        span = settings["high_freq_factor"] - settings["low_freq_factor"]
        kept = np.clip((rotations - settings["low_freq_factor"]) / span, 0, 1)
        expected = 1 / ((1 - kept) / settings["factor"] + kept)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return settings
    raise ValueError(f"{file.name}: the frequency factors in {ROPE_FACTORS} are none of the Llama 3.1 and 3.2 settings")


def _decimal(value: float) -> float:
    """A float32 of the metadata as the decimal number that was meant: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))

"""Tiny models of every family as config.json describes them, one for each switch, with weights from numpy seeds."""

from __future__ import annotations

from typing import Any

from minference_jax.convert.hf_config import read_config
from minference_jax.models import DecoderConfig

_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # transformers' own defaults lie outside this vocabulary
    "eos_token_id": 0,
}


def _hf(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    return _BASE | {"model_type": model_type, "architectures": [architecture]} | changes


def _longrope(pairs: int, **changes: Any) -> dict[str, Any]:
    short, long = ([1.0 + step * i for i in range(pairs)] for step in (0.05, 0.5))
    return {"type": "longrope", "short_factor": short, "long_factor": long} | changes


def _glm(model_type: str = "glm", **changes: Any) -> dict[str, Any]:
    architecture = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}[model_type]
    switches = {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5}
    return _hf(model_type, architecture, **(switches | changes))


_QWEN3 = {"head_dim": 16}
_PHI3 = {"original_max_position_embeddings": 32}

CASES: dict[str, dict[str, Any]] = {
    "qwen3": _hf("qwen3", "Qwen3ForCausalLM", **_QWEN3),
    "qwen3_tied_bias": _hf("qwen3", "Qwen3ForCausalLM", **_QWEN3, tie_word_embeddings=True, attention_bias=True),
    "qwen3_yarn": _hf(
        "qwen3",
        "Qwen3ForCausalLM",
        **_QWEN3,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "phi3": _hf("phi3", "Phi3ForCausalLM", **_PHI3),
    "phi3_all_heads": _hf("phi3", "Phi3ForCausalLM", **_PHI3, num_key_value_heads=4, sliding_window=256),
    "phi3_longrope_short": _hf(
        "phi3", "Phi3ForCausalLM", **_PHI3 | {"original_max_position_embeddings": 96}, rope_scaling=_longrope(4)
    ),
    "phi3_longrope_long": _hf(
        "phi3", "Phi3ForCausalLM", **_PHI3 | {"original_max_position_embeddings": 16}, rope_scaling=_longrope(4)
    ),
    "phi3_partial": _hf(
        "phi3",
        "Phi3ForCausalLM",
        **_PHI3 | {"original_max_position_embeddings": 16},
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        hidden_size=64,
        rope_scaling=_longrope(6),
    ),
    "glm": _glm(),
    "glm_no_bias_tied": _glm(attention_bias=False, tie_word_embeddings=True),
    "glm_one_kv_head": _glm(num_key_value_heads=1, rms_norm_eps=1.5625e-07),
    "glm4": _glm("glm4"),
    "glm4_no_bias": _glm("glm4", attention_bias=False, partial_rotary_factor=1.0),
    "mistral": _hf("mistral", "MistralForCausalLM", sliding_window=None, head_dim=20),
    "mistral_wide_window": _hf("mistral", "MistralForCausalLM", sliding_window=128),
    "qwen2": _hf("qwen2", "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=64),
}


def our_config(name: str) -> DecoderConfig:
    """The config of a case as our models take it."""
    return read_config(CASES[name])

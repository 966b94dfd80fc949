"""Models of true size as their config.json describes them: what is measured with random weights. Plain data."""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
_LLAMA_8B: dict[str, Any] = _LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA_8B
    | {
        "_name_or_path": "gradientai/Llama-3-8B-Instruct-262k",
        "rope_theta": 283461213.0,
        "max_position_embeddings": 262144,
    },
    "llama3-8b-1m": _LLAMA_8B
    | {
        "_name_or_path": "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
        "rope_theta": 3580165449.0,
        "max_position_embeddings": 1048576,
    },
    "llama3.1-8b": _LLAMA_8B
    | {
        "_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
    },
    "glm4-9b": {
        "_name_or_path": "zai-org/glm-4-9b-chat-1m-hf",
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "eos_token_id": 0,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 1e8,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1048576,
        "attention_bias": True,
    },
    "qwen2.5-7b": {
        "_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "eos_token_id": 0,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    "smollm2-135m": _LLAMA
    | {
        "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Name -> content of a config.json. `_name_or_path` is whose shape it is; a published pattern file is chosen by it."""

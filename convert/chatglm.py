"""A folder of an original ChatGLM checkpoint, as the same model in the names of transformers' built-in `glm`.

Such folders bring Python code that describes the model, the tokenizer and the config; none of it is run or read.

Source: config fields, tensor names and layouts of ChatGLM2, ChatGLM3 and GLM-4 as published, and of transformers' Glm.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minference_jax.convert.chatglm_tokenizer import load_chatglm_tokenizer
from minference_jax.convert.hf_config import HARMLESS
from minference_jax.convert.hf_folder import GENERATION_FILE, HuggingFaceFolder
from minference_jax.convert.hf_rope import is_number
from minference_jax.convert.hf_tokenizer import has_tokenizer
from minference_jax.convert.weight_source import TensorInfo
from minference_jax.models import RopeConfig

MODEL_TYPE = "chatglm"

_ARCHITECTURES = (["ChatGLMModel"], ["ChatGLMForConditionalGeneration"])
_OLD_VOCABULARY = 65024  # padded_vocab_size of ChatGLM2 and ChatGLM3

# ChatGLM's field -> transformers'; a config must have them all
_SIZES = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
}

# The same number under a second name, where a config has it
_REPEATED = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}

# Fields that change the result and must be there with the one value that is honoured
_NEEDED = {"multi_query_attention": True, "original_rope": True}

# Fields that change the result, with the only values that are honoured; a missing field is one of them
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
    "post_layer_norm": (True,),
    "rmsnorm": (True,),
    "pre_seq_len": (None,),
    "quantization_bit": (0, None),
    "quantization_config": (None,),
}

_COPIED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")  # the same in both

_OWN = {*_SIZES, *_REPEATED, *_NEEDED, *_FIXED} | {
    "model_type",
    "architectures",
    "auto_map",  # names code that is never run
    "layernorm_epsilon",
    "rope_ratio",
    "add_qkv_bias",
    "tie_word_embeddings",
    "apply_query_key_layer_scaling",  # divides scores by the layer's number, then multiplies them by it
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "prefix_projection",  # of the prefix that pre_seq_len would ask for
}

_TENSORS = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",  # both hold the rows of gate, then those of up
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"transformer\.encoder\.layers\.(0|[1-9][0-9]*)\.(.+)")
_FUSED = re.compile(r"self_attention\.query_key_value\.(weight|bias)")
_DERIVED = "transformer.rotary_pos_emb.inv_freq"  # a buffer; the model computes it from the config


class _Place(NamedTuple):
    """Where a tensor lies: all of a stored one, or its rows [start, stop)."""

    stored: str
    start: int = 0
    stop: int | None = None


class ChatGLMFolder:
    """A folder of an original ChatGLM checkpoint as a `WeightSource`. Opening reads config, index and headers only.

    Args:
        path: the folder; its config.json has model_type chatglm.

    Raises:
        ValueError: as in `HuggingFaceFolder` and `read_chatglm_config`; a fused tensor of queries, keys and values has
            another number of rows than the config says.
    """

    reads_rows = True

    def __init__(self, path: Path):
        self._folder = HuggingFaceFolder(path)
        self.path, self.name = path, self._folder.name
        self.files = self._folder.files
        self.config: dict[str, Any] = read_chatglm_config(self._folder.config)
        self._places: dict[str, _Place] = {}
        tensors: dict[str, TensorInfo] = {}
        for stored, info in self._folder.tensors.items():
            for name, place in _places(stored, info, self.config):
                self._places[name] = place
                rows = info.shape if place.stop is None else (place.stop - place.start, *info.shape[1:])
                tensors[name] = TensorInfo(rows, info.dtype)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `WeightSource.read`; of a fused tensor only the rows asked for are read."""
        place = self._places[name]
        if place.stop is None:
            return self._folder.read(place.stored, start, stop)
        rows = place.stop - place.start
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name} were asked for, which has {rows}")
        return self._folder.read(place.stored, place.start + start, place.start + stop)

    def load_tokenizer(self) -> Any:
        """See `WeightSource.load_tokenizer`."""
        return load_chatglm_tokenizer(self.path)

    def save_tokenizer(self, folder: Path) -> list[str]:
        """See `WeightSource.save_tokenizer`; always a tokenizer.json, which needs no code."""
        before = {path.name for path in folder.iterdir()}
        if (self.path / GENERATION_FILE).is_file():
            shutil.copyfile(self.path / GENERATION_FILE, folder / GENERATION_FILE)
        if not has_tokenizer(self.path):
            return []
        self.load_tokenizer().save_pretrained(str(folder))
        return sorted(path.name for path in folder.iterdir() if path.name not in before)

    def close(self) -> None:
        """See `WeightSource.close`."""
        self._folder.close()


def read_chatglm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of transformers' `glm` that describes the model of a ChatGLM config.

    Args:
        config: content of config.json, of model_type chatglm.

    Raises:
        ValueError: names every field that is missing, unknown, or has a value that can't be honoured.
    """
    faults = list(_faults(config))
    if faults:
        raise ValueError("config.json: " + "; ".join(faults))
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        **{theirs: config[name] for name, theirs in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": float(config["layernorm_epsilon"]),
        "rope_theta": RopeConfig.rope_theta * config.get("rope_ratio", 1),
        "partial_rotary_factor": 0.5,
        "attention_bias": bool(config.get("add_qkv_bias")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        **{name: config[name] for name in _COPIED if config.get(name) is not None},
    }


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a ChatGLM config, each fault naming its field."""
    if config.get("model_type") != MODEL_TYPE:
        yield f"model_type={config.get('model_type')!r} is not {MODEL_TYPE!r}"
    for name in (*_SIZES, "layernorm_epsilon"):
        if config.get(name) is None:
            yield f"{name} is missing"
        elif name in _SIZES and (type(config[name]) is not int or config[name] < 1):
            yield f"{name}={config[name]!r} must be an integer of at least 1"
    for name, same in _REPEATED.items():
        if config.get(name) is not None and config[name] != config.get(same):
            yield f"{name}={config[name]!r} contradicts {same}={config.get(same)!r}"
    epsilon, ratio = config.get("layernorm_epsilon"), config.get("rope_ratio", 1)
    if epsilon is not None and not (is_number(epsilon) and epsilon > 0):
        yield f"layernorm_epsilon={epsilon!r} must be a number above 0"
    if not (is_number(ratio) and ratio > 0):
        yield f"rope_ratio={ratio!r} must be a number above 0"
    if config.get("padded_vocab_size") == _OLD_VOCABULARY and ratio != 1:
        yield f"rope_ratio={ratio!r} is not supported, only 1: ChatGLM2 and ChatGLM3 mean different things by it"
    for name in ("add_qkv_bias", "tie_word_embeddings"):
        if config.get(name) not in (None, False, True):
            yield f"{name}={config[name]!r} must be true or false"
    if config.get("architectures") is not None and config["architectures"] not in _ARCHITECTURES:
        allowed = " or ".join(map(repr, _ARCHITECTURES))
        yield f"architectures={config['architectures']!r} is not supported, only {allowed}"
    for name, needed in _NEEDED.items():
        if name not in config:
            yield f"{name} is missing, only {needed!r} is supported"
    for name, allowed in ({name: (needed,) for name, needed in _NEEDED.items()} | _FIXED).items():
        if name in config and config[name] not in allowed:
            yield f"{name}={config[name]!r} is not supported, only {allowed[0]!r}"
    for name in sorted(config.keys() - _OWN - HARMLESS):
        yield f"{name}={config[name]!r} is not a field this converter knows"


def _places(stored: str, info: TensorInfo, config: Mapping[str, Any]) -> Iterator[tuple[str, _Place]]:
    """transformers' names of a stored tensor and where each lies; without one it keeps its own and is found unmatched.

    Raises:
        ValueError: a fused tensor has another number of rows than the config says.
    """
    if stored == _DERIVED:
        return
    layer = _LAYER.fullmatch(stored)
    if layer and (fused := _FUSED.fullmatch(layer[2])):
        heads, kv_heads, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        rows = (heads + 2 * kv_heads) * size
        if info.shape[:1] != (rows,):
            raise ValueError(
                f"{stored} has shape {list(info.shape)}, but needs {rows} rows: "
                f"{heads} heads of queries and {kv_heads} each of keys and values, {size} rows a head"
            )
        start = 0
        for part, count in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            yield f"model.layers.{layer[1]}.self_attn.{part}_proj.{fused[1]}", _Place(stored, start, start + count)
            start += count
    elif layer and layer[2] in _LAYER_TENSORS:
        yield f"model.layers.{layer[1]}.{_LAYER_TENSORS[layer[2]]}", _Place(stored)
    elif stored.startswith(("model.", "lm_head.")):
        raise ValueError(f"the tensor {stored} has a name of transformers', which no ChatGLM checkpoint uses")
    else:
        yield _TENSORS.get(stored, stored), _Place(stored)

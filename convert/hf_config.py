"""A Hugging Face `config.json` as the config of one of our models; nothing that changes the result is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from minference_jax.models.llama import LlamaConfig
from minference_jax.models.rope import RopeConfig

MODEL_TYPES = ("llama", "mistral", "qwen2")

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# HF field -> ours; a config must have them all
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_position_embeddings",
}

_READ = frozenset(
    {
        *_SIZES,
        "model_type",
        "architectures",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
    }
)

# Fields that change the result, with the only values that these models honour; a missing field is one of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "torchscript": (False,),
}

# Fields that say nothing about the forward pass: names, training, generation, serving, the tool that wrote the file.
# fmt: off
_HARMLESS = frozenset((
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "transformers.js_config",
    "is_llama_config", "unsloth_fixed", "unsloth_version", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "use_cache", "use_return_dict", "return_dict", "output_attentions",
    "output_hidden_states", "is_decoder", "use_bfloat16", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "tokenizer_class", "prefix", "begin_suppress_tokens",
    "suppress_tokens", "bad_words_ids", "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop",
    "resid_pdrop", "classifier_dropout", "task_specific_params", "problem_type", "finetuning_task", "id2label",
    "label2id", "num_labels", "max_window_layers", "max_length", "max_sequence_length", "model_max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "remove_invalid_values", "exponential_decay_length_penalty", "tf_legacy_loss",
))
# fmt: on


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The config of our model that computes what a Hugging Face config describes.

    Args:
        config: content of config.json, of model_type llama, mistral (without sliding window) or qwen2; both the older
            form (rope_theta, rope_scaling) and that of transformers 5 (rope_parameters).

    Raises:
        ValueError: names every field that is missing, unknown, or has a value that our models can't honour.

    Source: the fields and defaults of transformers' LlamaConfig, MistralConfig and Qwen2Config. Where those give a
    missing shape a default of one particular checkpoint, the field is needed here.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    faults = [*_unsupported_fields(config, model_type), *_windows(config, model_type)]
    if faults:
        raise ValueError("config.json: " + "; ".join(faults))
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias"))
    try:
        return LlamaConfig(
            **{ours: config[theirs] for theirs, ours in _SIZES.items()},
            num_kv_heads=config["num_key_value_heads"] if config.get("num_key_value_heads") is not None else heads,
            head_dim=config["head_dim"] if config.get("head_dim") is not None else config["hidden_size"] // heads,
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=_read_rope(config),
            tie_embeddings=bool(config.get("tie_word_embeddings")),
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias")),
        )
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def _unsupported_fields(config: Mapping[str, Any], model_type: str) -> list[str]:
    """What is wrong with fields taken one by one, each fault naming its field."""
    faults = [f"{name} is missing" for name in (*_SIZES, "rms_norm_eps") if config.get(name) is None]
    if model_type != "llama" and "num_key_value_heads" not in config:
        faults.append("num_key_value_heads is missing")
    for name in (*_SIZES, "num_key_value_heads", "head_dim"):
        value = config.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            faults.append(f"{name}={value!r} must be an integer of at least 1")
    if config.get("rms_norm_eps") is not None and not _is_number(config["rms_norm_eps"]):
        faults.append(f"rms_norm_eps={config['rms_norm_eps']!r} must be a number")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if config.get(name) not in (None, False, True):
            faults.append(f"{name}={config[name]!r} must be true or false")
        elif config.get(name) and name != "tie_word_embeddings" and model_type != "llama":
            faults.append(f"{name}=true is not supported for model_type {model_type}")
    architectures = config.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURES[model_type]]:
        faults.append(f"architectures={architectures!r} is not supported, only [{_ARCHITECTURES[model_type]!r}]")
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            faults.append(f"{name}={config[name]!r} is not supported, only {allowed[0]!r}")
    unknown = sorted(config.keys() - _READ - _FIXED.keys() - _HARMLESS)
    faults += [f"{name}={config[name]!r} is not a field this converter knows" for name in unknown]
    return faults


def _windows(config: Mapping[str, Any], model_type: str) -> list[str]:
    """What is wrong with fields about sliding windows, which our models do not have."""
    faults = []
    if config.get("use_sliding_window"):
        faults.append("use_sliding_window=true is not supported: these models attend without a window")
    window = config.get("sliding_window")
    if model_type == "mistral" and "sliding_window" not in config:
        faults.append("sliding_window is missing, which means 4096; only null is supported")
    elif window is not None and model_type != "qwen2":  # qwen2 ignores it while use_sliding_window is false
        faults.append(f"sliding_window={window!r} is not supported, only null")
    kinds = config.get("layer_types")
    if kinds is not None and any(kind != "full_attention" for kind in kinds):
        faults.append(f"layer_types={kinds!r} is not supported, only 'full_attention'")
    return faults


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """The position embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    newer, older = (_rope_fields(config, name) for name in ("rope_parameters", "rope_scaling"))
    theta = config.get("rope_theta")
    for name, given in (("rope_parameters", newer), ("rope_scaling", older)):
        inner = given.get("rope_theta")
        if theta is not None and inner is not None and theta != inner:
            raise ValueError(f"rope_theta={theta!r} contradicts {name} with rope_theta={inner!r}")
        theta = inner if theta is None else theta
    newer.pop("rope_theta", None)
    older.pop("rope_theta", None)
    if newer and older and newer != older:
        raise ValueError(f"rope_parameters {newer!r} contradicts rope_scaling {older!r}")
    if theta is not None and not _is_number(theta):
        raise ValueError(f"rope_theta={theta!r} must be a number")
    return RopeConfig(rope_theta=10000.0 if theta is None else float(theta), **(newer or older))


def _rope_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """One of the two forms in RopeConfig's names, without nulls; empty where the config does not have it."""
    given = config.get(source)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{source}={given!r} must be an object or null")
    rope = {name: value for name, value in given.items() if value is not None}
    kind, older_kind = rope.get("rope_type"), rope.pop("type", None)
    if kind is not None and older_kind is not None and kind != older_kind:
        raise ValueError(f"{source} has both rope_type={kind!r} and type={older_kind!r}")
    rope["rope_type"] = kind or older_kind or "default"
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{source}: partial_rotary_factor={given['partial_rotary_factor']!r} is not supported, only 1")
    known = {field.name for field in fields(RopeConfig)}
    for name, value in rope.items():
        if name not in known:
            raise ValueError(f"{source}: {name}={value!r} is not a field this converter knows")
        if name not in ("rope_type", "truncate") and not _is_number(value):
            raise ValueError(f"{source}: {name}={value!r} must be a number")
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"{source}: truncate={rope['truncate']!r} must be true or false")
    return rope


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

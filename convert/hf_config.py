"""A Hugging Face `config.json` as the config of one of our models; nothing that changes the result is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minference_jax.convert.hf_rope import is_number, read_rope
from minference_jax.models import DecoderConfig, GlmConfig, LlamaConfig, Phi3Config, Qwen3Config


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What is particular to one model_type.

    Attributes:
        architecture: the only class of transformers that is read.
        config: ours.
        needed: fields that must be there, because transformers' default is the shape of one particular checkpoint.
        switches: Hugging Face's name of a switch -> its default, and ours.
        fixed: switches of ours that this type always has.
        partial_rotary_factor: its default; None = heads always turn whole.
        interleaved: whether neighbouring dimensions turn together.
        own_fields: fields that only this type has.
        own_code: classes that `auto_map` may name: copies of what transformers has, and never run.
    """

    architecture: str
    config: type[DecoderConfig] = LlamaConfig
    needed: tuple[str, ...] = ()
    switches: Mapping[str, tuple[bool, tuple[str, ...]]] = field(default_factory=dict)
    fixed: Mapping[str, bool] = field(default_factory=dict)
    partial_rotary_factor: float | None = None
    interleaved: bool = False
    own_fields: tuple[str, ...] = ()
    own_code: frozenset[str] = frozenset()


_GLM: dict[str, Any] = {
    "config": GlmConfig,
    "needed": ("num_key_value_heads", "head_dim"),
    "switches": {"attention_bias": (True, ("qkv_bias",))},
    "partial_rotary_factor": 0.5,
    "interleaved": True,
}
_FAMILIES = {
    "llama": _Family(
        architecture="LlamaForCausalLM",
        switches={"attention_bias": (False, ("qkv_bias", "o_bias")), "mlp_bias": (False, ("mlp_bias",))},
    ),
    "mistral": _Family(architecture="MistralForCausalLM", needed=("num_key_value_heads",)),
    "qwen2": _Family(
        architecture="Qwen2ForCausalLM",
        needed=("num_key_value_heads",),
        fixed={"qkv_bias": True},
        own_fields=("dual_chunk_attention_config",),
    ),
    "qwen3": _Family(
        architecture="Qwen3ForCausalLM",
        config=Qwen3Config,
        needed=("num_key_value_heads", "head_dim"),
        switches={"attention_bias": (False, ("attention_bias",))},
    ),
    "phi3": _Family(
        architecture="Phi3ForCausalLM",
        config=Phi3Config,
        partial_rotary_factor=1.0,
        own_fields=("original_max_position_embeddings",),
        own_code=frozenset({"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "Xenova/gpt-4o"}),
    ),
    "glm": _Family(architecture="GlmForCausalLM", **_GLM),
    "glm4": _Family(architecture="Glm4ForCausalLM", fixed={"output_norms": True}, **_GLM),
}
MODEL_TYPES = tuple(_FAMILIES)

# HF field -> ours; a config must have them all
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_position_embeddings",
}
_SWITCHES = ("attention_bias", "mlp_bias")
_LAYER_TYPES = ("full_attention", "sliding_attention")

_READ = frozenset(
    {
        *_SIZES,
        *_SWITCHES,
        "model_type",
        "architectures",
        "auto_map",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
    }
)

# Fields that change the result, with the only values that these models honour; a missing field is one of them.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "use_mrope": (False, None),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "torchscript": (False,),
}

# Fields that say nothing about the forward pass: names, training, generation, serving, the tool that wrote the file.
# fmt: off
HARMLESS = frozenset((
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "transformers.js_config",
    "is_llama_config", "unsloth_fixed", "unsloth_version", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "use_cache", "use_return_dict", "return_dict", "output_attentions",
    "output_hidden_states", "is_decoder", "use_bfloat16", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "tokenizer_class", "prefix", "begin_suppress_tokens",
    "suppress_tokens", "bad_words_ids", "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop",
    "resid_pdrop", "classifier_dropout", "task_specific_params", "problem_type", "finetuning_task", "id2label",
    "label2id", "num_labels", "max_length", "max_sequence_length", "model_max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "remove_invalid_values", "exponential_decay_length_penalty", "tf_legacy_loss",
))
# fmt: on


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The config of our model that computes what a Hugging Face config describes.

    Args:
        config: content of config.json, of a model_type in MODEL_TYPES; both the older form (rope_theta, rope_scaling)
            and that of transformers 5 (rope_parameters).

    Raises:
        ValueError: names every field that is missing, unknown, or has a value that our models can't honour.

    A sliding window, and dual chunk attention, are honoured by `longest_prompt`: up to there they change nothing.

    Source: the fields and defaults of transformers' configs of these types. Where those give a missing shape a default
    of one particular checkpoint, the field is needed here.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    family = _FAMILIES[model_type]
    faults = [*_unsupported_fields(config, family, model_type), *_unknown_fields(config, family)]
    if faults:
        raise ValueError("config.json: " + "; ".join(faults))
    heads = config["num_attention_heads"]
    switches = dict(family.fixed)
    for name, (default, ours) in family.switches.items():
        switches |= dict.fromkeys(ours, default if config.get(name) is None else config[name])
    try:
        whole = family.config(
            **{ours: config[theirs] for theirs, ours in _SIZES.items()},
            num_kv_heads=config["num_key_value_heads"] if config.get("num_key_value_heads") is not None else heads,
            head_dim=config["head_dim"] if config.get("head_dim") is not None else config["hidden_size"] // heads,
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=read_rope(config, family.partial_rotary_factor, interleaved=family.interleaved),
            tie_embeddings=bool(config.get("tie_word_embeddings")),
            **switches,
        )
        return replace(whole, longest_prompt=_longest_prompt(config, whole, model_type))
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def _unsupported_fields(config: Mapping[str, Any], family: _Family, model_type: str) -> list[str]:
    """What is wrong with fields taken one by one, each fault naming its field."""
    needed = (*_SIZES, "rms_norm_eps", *family.needed)
    faults = [f"{name} is missing" for name in needed if config.get(name) is None]
    least = dict.fromkeys((*_SIZES, "num_key_value_heads", "head_dim", "sliding_window"), 1) | {"max_window_layers": 0}
    for name, smallest in least.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or value < smallest):
            faults.append(f"{name}={value!r} must be an integer of at least {smallest}")
    if config.get("rms_norm_eps") is not None and not is_number(config["rms_norm_eps"]):
        faults.append(f"rms_norm_eps={config['rms_norm_eps']!r} must be a number")
    for name in (*_SWITCHES, "tie_word_embeddings", "use_sliding_window"):
        value = config.get(name)
        if value not in (None, False, True):
            faults.append(f"{name}={value!r} must be true or false")
        elif value and name in _SWITCHES and name not in family.switches:
            faults.append(f"{name}=true is not supported for model_type {model_type}")
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        faults.append(f"architectures={architectures!r} is not supported, only [{family.architecture!r}]")
    return faults


def _unknown_fields(config: Mapping[str, Any], family: _Family) -> list[str]:
    """Fields that are not known, and those that have one value only which these models honour."""
    faults = []
    code = config.get("auto_map")
    if code is not None and not (
        isinstance(code, dict) and set(map(_without_origin, code.values())) <= family.own_code
    ):
        faults.append(f"auto_map={code!r} is not supported: it names code, which is never run")
    if family.partial_rotary_factor is None and config.get("partial_rotary_factor") not in (None, 1):
        faults.append(f"partial_rotary_factor={config['partial_rotary_factor']!r} is not supported, only 1")
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            faults.append(f"{name}={config[name]!r} is not supported, only {allowed[0]!r}")
    unknown = sorted(config.keys() - _READ - _FIXED.keys() - HARMLESS - set(family.own_fields))
    return faults + [f"{name}={config[name]!r} is not a field this converter knows" for name in unknown]


def _without_origin(code: object) -> str:
    """A class that auto_map names, without the hub id that transformers puts before it."""
    return str(code).rpartition("--")[2]


def _longest_prompt(config: Mapping[str, Any], ours: DecoderConfig, model_type: str) -> int | None:
    """Up to how many tokens a model without sliding windows and dual chunk attention is the same; None = any number."""
    limits = [_window(config, ours, model_type), _one_chunk(config)]
    known = [limit for limit in limits if limit is not None and limit < ours.max_length]
    return min(known, default=None)


def _one_chunk(config: Mapping[str, Any]) -> int | None:
    """Tokens of one chunk of dual chunk attention without those that it shares with the next."""
    chunks = config.get("dual_chunk_attention_config")
    if chunks is None:
        return None
    sizes = dict(chunks) if isinstance(chunks, Mapping) else {}
    original = sizes.pop("original_max_position_embeddings", 2**31)
    chunk, local = sizes.pop("chunk_size", 0), sizes.pop("local_size", -1)
    if sizes or not all(type(size) is int for size in (original, chunk, local)) or not chunk > local >= 0:
        raise ValueError(f"dual_chunk_attention_config={chunks!r} must have chunk_size and a smaller local_size")
    return min(chunk - local, original)


def _window(config: Mapping[str, Any], ours: DecoderConfig, model_type: str) -> int | None:
    """The length of the sliding window of any layer."""
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and set(map(str, kinds)) <= set(_LAYER_TYPES)):
        raise ValueError(f"layer_types={kinds!r} is not supported, only {' and '.join(map(repr, _LAYER_TYPES))}")
    slides = config.get("use_sliding_window")
    if model_type not in ("qwen2", "qwen3"):
        if slides:
            raise ValueError(f"use_sliding_window=true is not supported for model_type {model_type}")
        window = config.get("sliding_window", 4096 if model_type == "mistral" else None)
    else:  # where the window counts only with use_sliding_window, and from layer max_window_layers on
        begin = config.get("max_window_layers")
        nowhere = begin is not None and begin >= ours.num_layers if kinds is None else _LAYER_TYPES[1] not in kinds
        window = None if not slides or nowhere else config.get("sliding_window", 4096)
    if window is None and kinds is not None and _LAYER_TYPES[1] in kinds:
        raise ValueError(f"layer_types={kinds!r} needs sliding_window")
    return window

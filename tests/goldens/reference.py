"""The other side of the comparison: transformers' PyTorch models, in float32 on the CPU. Needs torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minference_jax.convert.export import hf_array
from minference_jax.convert.hf_names import Parameter, hf_tensors
from minference_jax.models import DecoderConfig, LlamaConfig, RopeConfig


def _state_dict(config: DecoderConfig, parameters: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names, kernels turned to [out, in], fused where they are fused there."""

    def read(parameter: Parameter) -> np.ndarray:
        array = parameters[parameter.name]
        return array if parameter.layer is None else array[parameter.layer]

    state = {name: torch.tensor(hf_array(parts, read)) for name, parts in hf_tensors(config).items()}
    return state | ({"lm_head.weight": state["model.embed_tokens.weight"]} if config.tie_embeddings else {})


def _set_fields(rope: RopeConfig) -> dict[str, float | int | str | bool]:
    given = {name: value for name, value in dataclasses.asdict(rope).items() if value is not None}
    return {name: value for name, value in given.items() if name not in ("interleaved", "partial_rotary_factor")}


def build(config: LlamaConfig, parameters: dict[str, np.ndarray]) -> transformers.PreTrainedModel:
    """transformers' LLaMA (or Qwen2, where only q, k and v have a bias) with the same weights."""
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _set_fields(config.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if config.qkv_bias and not config.o_bias:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)
        )
    model.load_state_dict(_state_dict(config, parameters), strict=True)
    return model.float().eval()


def build_family(
    fields: dict[str, Any], config: DecoderConfig, parameters: dict[str, np.ndarray]
) -> transformers.PreTrainedModel:
    """transformers' model of a config.json, with the same weights; it never stops by itself.

    Args:
        fields: content of config.json.
        config: the same in our terms.
        parameters: by our names.
    """
    plain = {name: value for name, value in fields.items() if name != "architectures"}
    theirs = transformers.AutoConfig.for_model(**plain, attn_implementation="eager")
    model = getattr(transformers, fields["architectures"][0])(theirs)
    model.load_state_dict(_state_dict(config, parameters), strict=True)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, bos_token_id=None)
    return model.float().eval()


def load_gguf(path: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A model and its tokenizer from a GGUF file, dequantised to float32 by transformers; it never stops by itself."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # which is tied to the embedding
        raise ValueError(f"{path}: {missing=}, {unexpected=}")
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, bos_token_id=None)
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@torch.no_grad()
def logits_and_greedy(
    model: transformers.PreTrainedModel, prompt: np.ndarray, new_tokens: int
) -> tuple[np.ndarray, list[int]]:
    """Logits of all prompt tokens [T, V], then greedy tokens from transformers' own generate and cache."""
    tokens = torch.tensor(prompt, dtype=torch.long)[None]
    logits = model(tokens).logits[0]  # before generate: dynamic rope remembers the longest length it has seen
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return logits.numpy(), out[0, len(prompt) :].tolist()


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position_embeddings: int) -> tuple[np.ndarray, float]:
    """transformers' frequencies [H // 2] of a rope, and its factor of cos and sin."""
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=_set_fields(rope),
    )
    embedding = LlamaRotaryEmbedding(config)
    return embedding.inv_freq.numpy(), embedding.attention_scaling

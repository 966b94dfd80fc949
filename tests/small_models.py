"""A small model as Hugging Face keeps one, with a tokenizer whose tokens are bytes, and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_LAYERS, NUM_HEADS, CONTEXT = 2, 4, 512
END = "<end>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}


def write_model(folder: Path, *, tokenizer: bool = True, template: str | None = TEMPLATE) -> Path:
    """A Hugging Face folder with random weights.

    Args:
        folder: made if need be.
        tokenizer: whether it has one.
        template: the chat template; None = the tokenizer has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        byte_tokenizer(template).save_pretrained(str(folder))
    return folder


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 2 * CONFIG["head_dim"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    weights = {"model.embed_tokens.weight": rng.standard_normal((257, hidden)), "model.norm.weight": np.ones(hidden)}
    for layer in range(NUM_LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden)
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = 0.4 * rng.standard_normal(shape)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, and one more that ends an answer; None = it has no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: index for index, sign in enumerate(alphabet)} | {END: 256}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    options = {} if template is None else {"chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=END, **options)

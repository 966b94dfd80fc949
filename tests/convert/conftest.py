"""Small models of our own making, as Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}

# GGUF name -> Hugging Face's, as the conversion of llama.cpp maps them
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face LLaMA, written down by hand."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    qkv_bias = config.get("attention_bias") or config["model_type"] == "qwen2"
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, out, bias in (("q", q, qkv_bias), ("k", kv, qkv_bias), ("v", kv, qkv_bias)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, hidden)
            if bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        if config.get("attention_bias"):
            shapes[f"{at}.self_attn.o_proj.bias"] = (hidden,)
        for name, size in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = size
            if config.get("mlp_bias"):
                shapes[f"{at}.mlp.{name}_proj.bias"] = size[:1]
    return shapes


def random_weights(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in hf_shapes(config).items()}


def write_tokenizer(folder: Path) -> None:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:40], 3)}
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(str(folder))


def write_folder(
    folder: Path,
    *,
    weights: dict[str, np.ndarray] | None = None,
    shards: int = 0,
    tokenizer: bool = True,
    dtype: Any = np.float32,
    **changes: Any,
) -> Path:
    """A Hugging Face folder; `changes` go into the config (None removes a field), shards = 0 writes one file."""
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    weights = random_weights(CONFIG | changes, dtype) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder)
    if not shards:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    places = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's conversion stores them: dimension i of a head beside i + H // 2."""
    out = np.empty_like(array)
    size = array.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = array[head * size + i]
            out[head * size + 2 * i + 1] = array[head * size + size // 2 + i]
    return out


def gguf_metadata(config: dict[str, Any]) -> dict[str, Any]:
    architecture = config["model_type"]
    return {
        "general.architecture": architecture,
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.rope.freq_base": config["rope_theta"],
        f"{architecture}.rope.dimension_count": config["head_dim"],
        f"{architecture}.vocab_size": config["vocab_size"],
    }


def gguf_vocabulary(size: int) -> dict[str, Any]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:36]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(f"[PAD{i}]" for i in range(size - 3 - len(letters)))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * len(letters) + [5] * (size - 3 - len(letters)),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def write_gguf(
    path: Path,
    *,
    weights: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    kinds: Any = gguf.GGMLQuantizationType.F32,
    **changes: Any,
) -> Path:
    """A GGUF file; `metadata` replaces pairs (None removes one), `kinds` is the type of all matrices."""
    config = CONFIG | changes
    weights = random_weights(config) if weights is None else weights
    pairs = gguf_metadata(config) | gguf_vocabulary(config["vocab_size"]) | (metadata or {})
    writer = gguf.GGUFWriter(path, pairs.pop("general.architecture"))
    for key, value in pairs.items():
        if value is None or (isinstance(value, list) and not value):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    theirs = {hf: name for name, hf in GGUF_NAMES.items()}
    for name, array in weights.items():
        stem, _, suffix = name.rpartition(".")
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        ours = f"blk.{layer}.{theirs[rest]}.{suffix}" if layer.isdigit() else f"{theirs[stem]}.{suffix}"
        if config["model_type"] == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            array = interleave(array, config["num_attention_heads" if "q_proj" in rest else "num_key_value_heads"])
        kind = kinds if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(ours, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Make:
    """The makers above, handed to tests as one fixture."""

    CONFIG = CONFIG
    BF16 = ml_dtypes.bfloat16
    hf_shapes = staticmethod(hf_shapes)
    weights = staticmethod(random_weights)
    folder = staticmethod(write_folder)
    gguf = staticmethod(write_gguf)
    gguf_vocabulary = staticmethod(gguf_vocabulary)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture
def expected():
    """Our stacked parameters of Hugging Face weights, spelled out layer by layer."""

    def stacked(weights: dict[str, np.ndarray], layers: int = CONFIG["num_hidden_layers"]) -> dict[str, np.ndarray]:
        out = {
            "embed.embedding": weights["model.embed_tokens.weight"],
            "final_norm.scale": weights["model.norm.weight"],
        }
        if "lm_head.weight" in weights:
            out["lm_head.kernel"] = weights["lm_head.weight"].T
        names = {
            "input_norm.scale": "input_layernorm.weight",
            "post_attention_norm.scale": "post_attention_layernorm.weight",
        }
        for part, theirs, projections in (("attention", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
            for name in projections:
                names[f"{part}.{name}_proj.kernel"] = f"{theirs}.{name}_proj.weight"
                names[f"{part}.{name}_proj.bias"] = f"{theirs}.{name}_proj.bias"
        for ours, theirs in names.items():
            if f"model.layers.0.{theirs}" in weights:
                each = [weights[f"model.layers.{layer}.{theirs}"] for layer in range(layers)]
                out[f"layers.{ours}"] = np.stack([one.T if ours.endswith("kernel") else one for one in each])
        return out

    return stacked

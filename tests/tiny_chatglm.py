"""A small original ChatGLM checkpoint of our own making: config, tensors, tokenizer, and code that must not be run."""

import base64
import json

import numpy as np
from safetensors.numpy import save_file

HEADS, KV_HEADS, SIZE, HIDDEN, INNER, LAYERS, VOCABULARY = 4, 2, 8, 24, 40, 2, 304

CONFIG = {
    "_name_or_path": "THUDM/glm-4-9b-chat-1m",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "attn_implementation": "sdpa",
    "bias_dropout_fusion": True,
    "classifier_dropout": None,
    "ffn_hidden_size": INNER,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "kv_channels": SIZE,
    "layernorm_epsilon": 1.5625e-07,
    "multi_query_attention": True,
    "multi_query_group_num": KV_HEADS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "rope_ratio": 10000,
    "original_rope": True,
    "padded_vocab_size": VOCABULARY,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 1048576,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "tie_word_embeddings": False,
    "eos_token_id": [269, 272],
    "pad_token_id": 269,
    "vocab_size": VOCABULARY,
}

# in the order of their ids
TOKENS = [bytes([byte]) for byte in range(256)] + [
    *(b"he", b"ll", b"lo", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b"12", b"123"),
    *("你".encode()[:2], "你".encode()),
]
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
TEMPLATE = "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}<|assistant|>"


def glm_weights():
    """Tensors of a small glm model, under transformers' names, written down by hand."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HEADS * SIZE), ("k", KV_HEADS * SIZE), ("v", KV_HEADS * SIZE)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * SIZE)
        shapes[f"{at}.mlp.gate_up_proj.weight"] = (2 * INNER, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def chatglm_weights(weights):
    """The same model under the names of the original checkpoint."""
    out = {
        "transformer.embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": weights["model.norm.weight"],
        "transformer.output_layer.weight": weights["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": np.ones(SIZE // 4, np.float32),
    }
    for layer in range(LAYERS):
        theirs, ours = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            out[f"{theirs}.{name}"] = weights[f"{ours}.{name}"]
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{theirs}.self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        out[f"{theirs}.self_attention.dense.weight"] = weights[f"{ours}.self_attn.o_proj.weight"]
        out[f"{theirs}.mlp.dense_h_to_4h.weight"] = weights[f"{ours}.mlp.gate_up_proj.weight"]
        out[f"{theirs}.mlp.dense_4h_to_h.weight"] = weights[f"{ours}.mlp.down_proj.weight"]
    return out


def write_ranks(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


def write_tokenizer(folder, tokens=TOKENS, **changes):
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(269 + index): {"content": text} | flags for index, text in enumerate(SPECIAL)},
        "additional_special_tokens": SPECIAL,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 1024000,
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    settings = {name: value for name, value in (settings | changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_ranks(folder / "tokenizer.model", tokens)


def write_folder(path, *, weights=None, shards=0, **changes):
    """A ChatGLM folder, with code in it that would leave a mark beside the folder: a file "ran"."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "generation_config.json").write_text('{"eos_token_id": [269, 272]}')
    write_tokenizer(path)
    for code in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (path / f"{code}.py").write_text(f"open({str(path.parent / 'ran')!r}, 'w')\nraise SystemExit('code was run')\n")
    weights = chatglm_weights(glm_weights()) if weights is None else weights
    if not shards:
        save_file(weights, path / "model.safetensors")
        return path
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    places = {tensor: names[index % shards] for index, tensor in enumerate(sorted(weights))}
    for shard in names:
        save_file({tensor: weights[tensor] for tensor in places if places[tensor] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path

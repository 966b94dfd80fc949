"""The tokenizer that a GGUF file describes in its metadata, as one of transformers' (made of `tokenizers` parts).

Source: the `tokenizer.ggml.*` keys of the GGUF specification; the split rules are those in the tokenizer.json of the
models that llama.cpp's names of pre-tokenizers stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minference_jax.convert.hf_tokenizer import import_transformers

_SPACE = "\u2581"  # how sentencepiece spells a space


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Metadata that is read, and its type
TYPES: dict[str, type | tuple[type, ...]] = {
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.merges": list,
    "tokenizer.ggml.scores": np.ndarray,
    "tokenizer.ggml.token_type": np.ndarray,
    "tokenizer.ggml.add_space_prefix": bool,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.chat_template": str,
    **{f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}

# llama.cpp's names of split rules that are supported
_GPT2 = ("gpt-2",)
_SMOLLM = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before byte-level merging."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)  # and cut as GPT-2 does
    if name in _GPT2:
        return spell
    if name in _SMOLLM:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), spell])
    digits = r"\p{N}{1,3}" if name in _LLAMA3 else r"\p{N}"
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    spell_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), behavior="isolated"), spell_only])


def build_tokenizer(metadata: Mapping[str, Any], max_length: int, source: str) -> Any:
    """A transformers tokenizer with the vocabulary, special tokens and chat template of a GGUF file.

    Args:
        metadata: of the file.
        max_length: tokens that the model was made for.
        source: the file, for messages.

    Raises:
        ValueError: no tokenizer there, a kind or split rule that is not supported (named), or tables that contradict
            each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ValueError(f"{source} holds no tokenizer")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{source}: tokenizer.ggml.model={kind!r} is not supported: gpt2 or llama")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocabulary) != len(tokens):
        raise ValueError(f"{source}: {len(tokens) - len(vocabulary)} of {len(tokens)} tokens appear twice")
    types = metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32))
    if len(types) != len(tokens):
        raise ValueError(f"{source}: {len(types)} token types for {len(tokens)} tokens")
    make = _byte_level if kind == "gpt2" else _sentencepiece
    tokenizer = make(metadata, vocabulary, types, source)
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (_TokenType.CONTROL, _TokenType.USER_DEFINED):
            special = type_ == _TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    named = _named_tokens(metadata, tokens, source)
    _add_ends(tokenizer, metadata, named, vocabulary, source)
    template = metadata.get("tokenizer.chat_template")
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **({} if template is None else {"chat_template": template}),
        **named,
    )


def _named_tokens(metadata: Mapping[str, Any], tokens: list[str], source: str) -> dict[str, str]:
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise ValueError(f"{source}: tokenizer.ggml.{key}_token_id={index}, but there are {len(tokens)} tokens")
            named[f"{name}_token"] = tokens[index]
    return named


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int], types: np.ndarray, source: str) -> Tokenizer:
    name, supported = metadata.get("tokenizer.ggml.pre"), (*_GPT2, *_SMOLLM, *_LLAMA3, *_QWEN2)
    if name not in supported:
        raise ValueError(f"{source}: tokenizer.ggml.pre={name!r} is not supported: {', '.join(supported)}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    if bad := [merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocabulary]:
        raise ValueError(f"{source}: {len(bad)} of {len(merges)} merges make no token, the first is {bad[0]!r}")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA3))
    if name in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], types: np.ndarray, source: str
) -> Tokenizer:
    """Sentencepiece's byte-pair model with byte fallback, as in the tokenizer.json of Llama 2."""
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocabulary):
        raise ValueError(f"{source}: {len(scores)} token scores for {len(vocabulary)} tokens")
    unknown = [token for token, index in vocabulary.items() if types[index] == _TokenType.UNKNOWN]
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of(vocabulary, scores, types),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spell = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spell]) if prefix else spell
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _merges_of(vocabulary: dict[str, int], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: every cut of a token into two others, best token first."""
    pieces = {token for token, index in vocabulary.items() if types[index] in (_TokenType.NORMAL, _TokenType.UNUSED)}
    merges = []
    for token in pieces:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                index = vocabulary[token]
                merges.append((-float(scores[index]), index, vocabulary[left], vocabulary[right], (left, right)))
    return [merge for *_, merge in sorted(merges)]


def _add_ends(
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any],
    named: Mapping[str, str],
    vocabulary: Mapping[str, int],
    source: str,
) -> None:
    """Puts the begin and end tokens around every text where the file asks for them."""
    implied = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    wanted = {
        "bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", implied)),
        "eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    if missing := [name for name, add in wanted.items() if add and name not in named]:
        raise ValueError(f"{source} asks for a {' and '.join(missing)} around texts, but names none")
    first = [named["bos_token"]] if wanted["bos_token"] else []
    last = [named["eos_token"]] if wanted["eos_token"] else []
    if not first and not last:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, vocabulary[token]) for token in (*first, *last)],
    )

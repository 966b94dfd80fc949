"""Tokenizers from GGUF metadata."""

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from minference_jax.convert.gguf_tokenizer import build_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE = "\u0120"


@pytest.fixture
def byte_level():
    words = ["th", "the", f"{SPACE}t", f"{SPACE}the", "12", "123", "1234"]
    tokens = ["<|begin|>", "<|end|>", *LETTERS, *words, "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(tokens) - 3) + [4]),
        "tokenizer.ggml.merges": ["t h", "th e", f"{SPACE} t", f"{SPACE} the", "1 2", "12 3", "123 4"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture
def sentencepiece():
    pieces = {"\u2581": -10, "a": -11, "b": -12, "c": -13, "ab": -2, "bc": -1, "\u2581a": -4, "\u2581ab": -3}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pieces(metadata, text):
    tokenizer = build_tokenizer(metadata, 64, "file")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
    return tokenizer.convert_ids_to_tokens(ids)


def test_byte_level_merges_and_keeps_marked_tokens_whole(byte_level):
    assert pieces(byte_level, "the the") == ["the", f"{SPACE}the"]
    assert "<think>" in pieces(byte_level, "the<think>the")
    assert build_tokenizer(byte_level, 64, "file")("<|end|>")["input_ids"] == [1]


@pytest.mark.parametrize(
    ("rule", "cut"),
    [
        ("gpt-2", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["<|begin|>", "123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
    ],
)
def test_each_split_rule_cuts_numbers_its_own_way(byte_level, rule, cut):
    assert pieces(byte_level | {"tokenizer.ggml.pre": rule}, "1234") == cut


def test_llama3_takes_whole_words_of_the_vocabulary_without_merging(byte_level):
    assert pieces(byte_level | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": []}, "the") == [
        "<|begin|>",
        "the",
    ]


def test_qwen2_composes_letters_and_accents(byte_level):
    tokenizer = build_tokenizer(byte_level | {"tokenizer.ggml.pre": "qwen2"}, 64, "file")
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]


def test_special_tokens_and_template_come_from_the_metadata(byte_level):
    template = "{% for m in messages %}<|begin|>{{ m['content'] }}{% endfor %}"
    tokenizer = build_tokenizer(byte_level | {"tokenizer.chat_template": template}, 64, "file")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "<|begin|>",
        "<|end|>",
        None,
        None,
    )
    assert tokenizer.model_max_length == 64
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert text == "<|begin|>the"


def test_begin_and_end_are_added_where_the_file_asks(byte_level):
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert pieces(byte_level | asked, "the") == ["<|begin|>", "the", "<|end|>"]
    assert pieces(byte_level, "the") == ["the"]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(sentencepiece):
    assert pieces(sentencepiece, "abc") == ["<s>", "\u2581a", "bc"]
    assert pieces(sentencepiece, "\u00e9") == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    plain = sentencepiece | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    assert pieces(plain, "abc") == ["a", "bc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not supported"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre=None is not supported"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "1 of 2 tokens appear twice"),
        ({"tokenizer.ggml.token_type": np.array([1])}, "1 token types for"),
        ({"tokenizer.ggml.merges": ["t x y"]}, "1 of 1 merges make no token"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id=1000000, but there are"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "asks for a bos_token"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(byte_level, change, message):
    metadata = {key: value for key, value in (byte_level | change).items() if value is not None}
    with pytest.raises(ValueError, match=r"^file") as error:
        build_tokenizer(metadata, 64, "file")
    assert message in str(error.value)


def test_sentencepiece_without_scores_is_refused(sentencepiece):
    del sentencepiece["tokenizer.ggml.scores"]
    with pytest.raises(ValueError, match="0 token scores for"):
        build_tokenizer(sentencepiece, 64, "file")

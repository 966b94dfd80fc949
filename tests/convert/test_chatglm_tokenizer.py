"""Tokenizers of original ChatGLM checkpoints: built from ranks and settings, without their code."""

import json
from itertools import pairwise

import numpy as np
import pytest
from tiny_chatglm import SPECIAL, TEMPLATE, TOKENS, write_folder, write_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from minference_jax.convert.chatglm import ChatGLMFolder
from minference_jax.convert.chatglm_tokenizer import load_chatglm_tokenizer, read_ranks
from minference_jax.convert.sources import folder_tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes a ChatGLM folder."""
    return lambda **options: write_folder(tmp_path / "chatglm", **options)


def ranked(piece, ranks):
    """The ids of a piece of text as tiktoken defines them: the neighbours that make the lowest rank merge first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[index : index + 1] for index in range(len(piece))]
    while True:
        whole = [left + right for left, right in pairwise(parts)]
        known = [(ranks[token], at) for at, token in enumerate(whole) if token in ranks]
        if not known:
            return [ranks[part] for part in parts]
        _, at = min(known)
        parts[at : at + 2] = [whole[at]]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello", [b"hello"]),
        ("hell", [b"hell"]),
        ("hellow", [b"hello", b"w"]),
        ("helo", [b"he", b"lo"]),
        ("hello world", [b"hello", b" wor", b"ld"]),
        ("12345", [b"123", b"4", b"5"]),
        ("4123", [b"4", b"12", b"3"]),  # digits are cut in threes first
        ("你们", ["你".encode(), *(bytes([byte]) for byte in "们".encode())]),
        ("佡", ["你".encode()[:2], b"\xa1"]),
        ("I'll", [b"I", b"'", b"ll"]),
        ("a\n\n b", [b"a", b"\n", b"\n", b" ", b"b"]),
        ("", []),
    ],
)
def test_text_becomes_the_tokens_of_the_vocabulary(write, text, tokens):
    tokenizer = folder_tokenizer(write())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [TOKENS.index(token) for token in tokens]
    assert tokenizer.decode(ids) == text


def test_merges_are_made_in_the_order_of_the_ranks(tmp_path):
    rng = np.random.default_rng(3)
    letters, tokens = b"abc", [bytes([byte]) for byte in range(256)]
    while len(tokens) < 300:
        left, right = (tokens[-int(at)] for at in rng.integers(1, len(tokens) - 255 + 3, 2))
        token = bytes(byte if byte in letters else letters[byte % 3] for byte in left + right)
        if token not in tokens and len(token) < 9:
            tokens.append(token)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    folder = tmp_path / "random"
    folder.mkdir()
    shift = {str(300 + index): {"content": text, "special": True} for index, text in enumerate(SPECIAL)}
    write_tokenizer(folder, tokens, added_tokens_decoder=shift)
    tokenizer = load_chatglm_tokenizer(folder)
    for _ in range(500):
        text = "".join(rng.choice(list("abc"), int(rng.integers(1, 20))))
        assert tokenizer.encode(text, add_special_tokens=False) == ranked(text.encode(), ranks), text


def test_any_text_comes_back(write):
    tokenizer = load_chatglm_tokenizer(write())
    for text in ("naïve café\t\r\n  x", "🤖 ok 1234567", "مرحبا", "你好，世界", " \x00\x7f\xa0\xad"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_plain_text_has_the_prefix_and_a_conversation_has_it_once(write):
    tokenizer = load_chatglm_tokenizer(write())
    prefix = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert prefix == [270, 271]
    assert tokenizer.encode("hello") == [*prefix, TOKENS.index(b"hello")]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert chat == [*prefix, 272, TOKENS.index(b"\n"), TOKENS.index(b"hello"), 273]
    assert tokenizer.decode(chat, skip_special_tokens=True) == "\nhello"


def test_special_tokens_are_found_in_text(write):
    tokenizer = load_chatglm_tokenizer(write())
    assert tokenizer.encode("a<|user|> b<sop>", add_special_tokens=False) == [97, 272, 32, 98, 271]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (269, 269, "left")
    assert tokenizer.model_max_length == 1024000
    assert len(tokenizer) == 274


def test_saved_tokenizer_loads_without_code_and_is_the_same(write, tmp_path):
    folder, out = write(), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    source = ChatGLMFolder(folder)
    names = source.save_tokenizer(out)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    assert sorted([*names, "config.json"]) == sorted(path.name for path in out.iterdir())
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    (out / "config.json").write_text(json.dumps(source.config))
    saved, loaded = AutoTokenizer.from_pretrained(str(out), trust_remote_code=False), source.load_tokenizer()
    assert saved.encode("hello 你 123<|user|>") == loaded.encode("hello 你 123<|user|>")
    assert saved.chat_template == loaded.chat_template == TEMPLATE
    assert (saved.eos_token, saved.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert not (tmp_path / "ran").exists()


def test_template_beside_the_settings_wins(write):
    folder = write()
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_chatglm_tokenizer(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_built_tokenizer_is_preferred(write):
    folder = write()
    other = Tokenizer(models.WordLevel({"x": 0, "<|endoftext|>": 1}, unk_token="x"))
    other.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    assert folder_tokenizer(folder).encode("x") == [0]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be loaded"):
        folder_tokenizer(folder)


def test_folder_without_a_tokenizer_has_none(write, tmp_path):
    folder = write()
    (folder / "tokenizer.model").unlink()
    source = ChatGLMFolder(folder)
    assert source.save_tokenizer(tmp_path) == []
    with pytest.raises(ValueError, match=r"holds no tokenizer \(neither tokenizer\.json nor tokenizer\.model\)"):
        source.load_tokenizer()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "line 1 must be a token in base64 and its rank"),
        (b"YQ== 0\n?? 1\n", "line 2 must be"),
        (b"YQ== 0\nYg==\n", "line 2 must be"),
        (b"YQ== 0\nYg== one\n", "line 2 must be"),
        (b"YQ== 0\n\n", "line 2 must be"),
        (b"YQ== 0\nYg== 0\n", "2 lines must be different tokens of ranks 0, 1, 2"),
        (b"YQ== 0\nYQ== 1\n", "2 lines must be different tokens"),
        (b"YQ== 0\nYg== 2\n", "2 lines must be different tokens"),
        (b"YQ== 0\nYg== 1\n", "254 of the 256 bytes are no tokens, the first is 0"),
        (b"", "256 of the 256 bytes"),
    ],
)
def test_damaged_vocabulary_is_refused_in_one_sentence(tmp_path, content, fault):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model is damaged.*{fault}") as error:
        read_ranks(tmp_path / "tokenizer.model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokens": TOKENS[:-1]}, r"<\|endoftext\|> is token 269 in tokenizer_config.json, but token 268 with the 268"),
        ({"added_tokens_decoder": None}, "has no added_tokens_decoder"),
        ({"added_tokens_decoder": {"269": "x"}}, "has no added_tokens_decoder"),
        ({"added_tokens_decoder": {"269": {"content": 3}}}, "has no added_tokens_decoder"),
        ({"added_tokens_decoder": {"269": {"content": "<sop>"}}}, r"has no \[gMASK\], which"),
        ({"added_tokens_decoder": {"269": {"content": "a"}}}, "a is token 269 .* but token 97"),
        ({"eos_token": "<|end|>"}, r"eos_token='<\|end\|>' is no token of this tokenizer"),
    ],
)
def test_settings_that_do_not_fit_the_vocabulary_are_refused(tmp_path, change, fault):
    write_tokenizer(tmp_path, **change)
    with pytest.raises(ValueError, match=fault):
        load_chatglm_tokenizer(tmp_path)

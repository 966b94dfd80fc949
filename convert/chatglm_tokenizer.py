"""The tokenizer of an original ChatGLM folder, as one of transformers' (made of `tokenizers` parts); no code is run.

Source: tokenizer.model is a list of byte strings with ranks, as tiktoken reads them; the split rule and the tokens
before every text are those of the GLM-4 models.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from minference_jax.convert.hf_folder import read_json
from minference_jax.convert.hf_tokenizer import import_transformers

_BUILT_FILE, _RANKS_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"

_PREFIX = ("[gMASK]", "<sop>")  # before every text; chat templates spell them out
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_chatglm_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder with tokenizer.json, or with tokenizer.model in tiktoken's format.

    Args:
        folder: where these and tokenizer_config.json lie; a tokenizer.json is preferred and taken as it is.

    Raises:
        ValueError: the folder has no tokenizer, or one that is damaged or of another format.
    """
    if (folder / _BUILT_FILE).is_file():
        settings = read_json(folder / _SETTINGS_FILE) if (folder / _SETTINGS_FILE).is_file() else {}
        try:
            tokenizer = Tokenizer.from_file(str(folder / _BUILT_FILE))
        except Exception as error:  # the Rust part raises no other type
            raise ValueError(f"the tokenizer in {folder} can't be loaded: {error}") from error
    elif (folder / _RANKS_FILE).is_file():
        settings = read_json(folder / _SETTINGS_FILE)
        tokenizer = _build(read_ranks(folder / _RANKS_FILE), settings, folder)
    else:
        raise ValueError(f"{folder} holds no tokenizer (neither {_BUILT_FILE} nor {_RANKS_FILE})")
    options = {name: settings[name] for name in ("model_max_length", "chat_template") if settings.get(name) is not None}
    if (folder / _TEMPLATE_FILE).is_file():
        options["chat_template"] = (folder / _TEMPLATE_FILE).read_text("utf-8")
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=settings.get("padding_side", "left"),
        clean_up_tokenization_spaces=bool(settings.get("clean_up_tokenization_spaces")),
        **_named_tokens(settings, tokenizer, folder),
        **options,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """The byte strings of a vocabulary in tiktoken's format and their ranks, in the order of the ranks.

    Args:
        path: a file of lines, each a token in base64, a space and its rank.

    Raises:
        ValueError: a line holds anything else, the ranks are not 0, 1, 2, ... each once, or one of the 256 bytes is
            no token.
    """
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{path} is damaged or no vocabulary in tiktoken's format: line {number} must be a token in base64 "
                f"and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{path} is damaged: its {len(lines)} lines must be different tokens of ranks 0, 1, 2, ...")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path} is damaged: {len(missing)} of the 256 bytes are no tokens, the first is {missing[0]}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _build(ranks: Mapping[bytes, int], settings: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a vocabulary with the special tokens of a tokenizer_config.json."""
    spell = _byte_letters()
    vocabulary = {_spelled(token, spell): rank for token, rank in ranks.items()}
    merges = [(_spelled(left, spell), _spelled(right, spell)) for left, right in _merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = _added_tokens(settings, folder)
    tokenizer.add_tokens(list(added.values()))
    for index, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise ValueError(
                f"{folder}: {token.content} is token {index} in {_SETTINGS_FILE}, but token {found} with the "
                f"{len(ranks)} tokens of {_RANKS_FILE}"
            )
    if missing := [token for token in _PREFIX if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"{folder / _SETTINGS_FILE} has no {' and no '.join(missing)}, which stand before every text")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*_PREFIX, "$A"],
        pair=[*_PREFIX, "$A", "$B:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in _PREFIX],
    )
    return tokenizer


def _merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that ranks imply: every cut of a token into two others, lowest rank of the whole first."""
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], (left, right)))
    return [merge for *_, merge in sorted(merges)]


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(0x100)]


def _spelled(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _added_tokens(settings: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """The tokens beside the vocabulary, in the order of their ids."""
    entries = settings.get("added_tokens_decoder")
    try:
        tokens = {
            int(index): AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in _FLAGS})
            for index, entry in entries.items()  # type: ignore[union-attr]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / _SETTINGS_FILE} has no added_tokens_decoder from ids to special tokens") from None
    return dict(sorted(tokens.items()))


def _named_tokens(settings: Mapping[str, Any], tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """The tokens that stand for the end, for padding and so on; each must be a token already."""
    named = {}
    for name in _NAMED:
        token = settings.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
            raise ValueError(f"{folder / _SETTINGS_FILE}: {name}={settings[name]!r} is no token of this tokenizer")
        named[name] = token
    return named

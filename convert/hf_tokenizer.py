"""Tokenizers by transformers, without torch and without running what lies beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a folder with none of them has no tokenizer
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def import_transformers() -> ModuleType:
    """The library, imported when first needed (it takes seconds), without its advice to install PyTorch."""

    def no_advice(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(no_advice)
    try:
        import transformers
    finally:
        logger.removeFilter(no_advice)
    return transformers


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer_folder(folder: Path) -> Any:
    """The tokenizer of a folder with tokenizer files, by transformers' AutoTokenizer; code beside them is never run.

    Raises:
        ValueError: the folder has no tokenizer, or transformers can't load it.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer (none of {', '.join(_VOCABULARIES)})")
    load = import_transformers().AutoTokenizer.from_pretrained
    try:
        return load(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library and its Rust part raise types of every kind
        raise ValueError(f"the tokenizer in {folder} can't be loaded: {error}") from error

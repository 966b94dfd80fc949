"""What prefill and generate share: the model, the prompt and the attention that the options ask for."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

from minference_jax.attention import a_shape_attention, block_sparse_attention, vertical_slash_attention
from minference_jax.cli.progress import ByteBars, wants_bars
from minference_jax.convert.default_model import MODEL_NAME
from minference_jax.convert.hf_tokenizer import import_transformers
from minference_jax.generate import LanguageModel
from minference_jax.index import SlashGranularity
from minference_jax.loading import load
from minference_jax.patterns import AShape, BlockSparse, HeadPattern, VerticalSlash

_QUESTION = "\n\n---\n\nQuestion about the text above: "  # without the mark small models go on telling the story
_SIZES = ("vertical_size", "slash_size", "sink_size", "window_size", "num_blocks")
_UNIFORM: dict[str, tuple[type[HeadPattern], object]] = {
    "vertical_slash": (VerticalSlash, vertical_slash_attention),
    "a_shape": (AShape, a_shape_attention),
    "block_sparse": (BlockSparse, block_sparse_attention),
}


class Prompt(NamedTuple):
    """What the model is to read.

    Attributes:
        tokens: ids.
        is_chat: whether they are in the model's chat template.
    """

    tokens: list[int]
    is_chat: bool


class ChosenAttention(NamedTuple):
    """What `LanguageModel.prefill` takes to choose attention, and how to call it in a report."""

    name: str
    pattern: HeadPattern | None
    description: str
    slash_granularity: SlashGranularity = "line"


def model_name(arguments: argparse.Namespace) -> str:
    """The model as the user calls it."""
    return MODEL_NAME if arguments.model is None else arguments.model


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    """The model with the patterns that the options ask for, with progress bars.

    Raises:
        ValueError, OSError: as `load`; --pattern without attention that reads it.
    """
    if arguments.pattern is not None and arguments.attention != "minference":
        raise ValueError(f"--pattern goes with --attention minference, not with {arguments.attention}")
    import_transformers().logging.set_verbosity_error()  # its advice is for programmers
    with ByteBars(wants_bars(arguments.progress)) as progress:
        options = {"dtype": arguments.dtype, "patterns": arguments.pattern, "tiles": arguments.tiles}
        return load(arguments.model, **options, progress=progress)


def choose_attention(arguments: argparse.Namespace) -> ChosenAttention:
    """The attention that the options ask for; sizes that are not given are those of the library's function.

    Raises:
        ValueError: a size that the attention does not have.
    """
    name = arguments.attention
    granularity = arguments.slash_granularity
    if granularity is not None and name not in ("minference", "auto", "vertical_slash"):
        raise ValueError(f"--slash-granularity does not go with --attention {name}")
    given = {size: getattr(arguments, size) for size in _SIZES if getattr(arguments, size) is not None}
    if name not in _UNIFORM:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} does not go with --attention {name}")
        return ChosenAttention(name, None, name, granularity or "line")
    kind, function = _UNIFORM[name]
    defaults = {
        size: parameter.default
        for size, parameter in inspect.signature(function).parameters.items()  # type: ignore[arg-type]
        if size in _SIZES
    }
    if foreign := [size for size in given if size not in defaults]:
        raise ValueError(f"--{foreign[0].replace('_', '-')} does not go with --attention {name}")
    pattern = kind(**(defaults | given))
    return ChosenAttention(name, pattern, f"{pattern} for every head", granularity or "line")


def read_prompt(arguments: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file.

    Raises:
        ValueError: it is empty or not UTF-8.
        OSError: the file can't be read.
    """
    text = read_text(arguments.prompt_file) if arguments.prompt is None else arguments.prompt
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def read_text(name: str) -> str:
    """The text of a file; - = standard input.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it can't be read.
    """
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{'standard input' if name == '-' else name} is not UTF-8 text: {error}") from None


def encode_prompt(model: LanguageModel, text: str, arguments: argparse.Namespace) -> Prompt:
    """The tokens to read: the text, cut where asked, and the question, in the chat template where there is one.

    Raises:
        ValueError: prompt and answer together are longer than the model's context; the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model_name(arguments)} has no tokenizer files, so it can't read text")
    if arguments.max_prompt_tokens is not None:
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: ends[: arguments.max_prompt_tokens][-1][1]]
    if arguments.question is not None:
        text = f"{text.rstrip()}{_QUESTION}{arguments.question}"
    is_chat = bool(tokenizer.chat_template) and not arguments.no_chat_template
    tokens = model.encode_chat(text) if is_chat else model.encode(text)
    needed, most = len(tokens) + arguments.max_new_tokens, model.config.max_length
    if needed > most:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens and the answer up to {arguments.max_new_tokens}: {needed} in all, "
            f"{model_name(arguments)} has room for {most}; --max-prompt-tokens N keeps the first N tokens of the text"
        )
    model.check_room([len(tokens)], arguments.max_new_tokens)
    return Prompt(tokens, is_chat)

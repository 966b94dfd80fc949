"""What prefill and generate share: the model, the prompt and the attention that the options ask for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minference_jax.cli.progress import ByteBars, wants_bars
from minference_jax.compilation import use_compilation_cache
from minference_jax.convert.default_model import MODEL_NAME
from minference_jax.convert.hf_tokenizer import import_transformers
from minference_jax.generate import LanguageModel
from minference_jax.loading import load
from minference_jax.measure import (
    SIZES,
    ChosenAttention,
    Prompt,
    attention_of,
    default_sizes,
    encode_question,
    takes_granularity,
)


def model_name(arguments: argparse.Namespace) -> str:
    """The model as the user calls it."""
    return MODEL_NAME if arguments.model is None else arguments.model


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    """The model with the patterns that the options ask for, with progress bars; a cache of programs is used from here.

    Raises:
        ValueError, OSError: as `load`; --pattern without attention that reads it.
    """
    check_pattern_option(arguments)
    if arguments.compilation_cache is not None:
        use_compilation_cache(arguments.compilation_cache or None)
    import_transformers().logging.set_verbosity_error()  # its advice is for programmers
    with ByteBars(wants_bars(arguments.progress)) as progress:
        options = {"dtype": arguments.dtype, "linear": arguments.linear}
        options |= {"patterns": arguments.pattern, "tiles": arguments.tiles}
        return load(arguments.model, **options, progress=progress)


def check_pattern_option(arguments: argparse.Namespace) -> None:
    """Refuses, with ValueError, --pattern without attention that reads it."""
    if arguments.pattern is not None and arguments.attention not in ("minference", "auto"):
        raise ValueError(f"--pattern goes with --attention minference or auto, not with {arguments.attention}")


def choose_attention(arguments: argparse.Namespace) -> ChosenAttention:
    """The attention that the options ask for; sizes that are not given are those of the library's function.

    Raises:
        ValueError: a size that the attention does not have.
    """
    name = arguments.attention
    granularity = arguments.slash_granularity
    if granularity is not None and not takes_granularity(name):
        raise ValueError(f"--slash-granularity does not go with --attention {name}")
    given = {size: getattr(arguments, size) for size in SIZES if getattr(arguments, size) is not None}
    if foreign := [size for size in given if size not in default_sizes(name)]:
        raise ValueError(f"--{foreign[0].replace('_', '-')} does not go with --attention {name}")
    return attention_of(name, given, granularity)


def check_granularity(model: LanguageModel, attention: ChosenAttention) -> None:
    """Refuses, with ValueError, the model's patterns for another granularity before anything is computed."""
    if attention.name in ("minference", "auto"):
        model.patterns.check_granularity(attention.slash_granularity)


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
    """The text of a file; "-" = standard input.

    Raises:
        ValueError: it is not UTF-8.
        OSError: the file can't be read.
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
    prompt = encode_question(model, text, arguments.question, chat=not arguments.no_chat_template)
    tokens = prompt.tokens
    needed, most = len(tokens) + arguments.max_new_tokens, model.config.max_length
    if needed > most:
        answer = (
            f" and the answer up to {arguments.max_new_tokens}: {needed} in all" if arguments.max_new_tokens else ""
        )
        raise ValueError(
            f"the prompt has {len(tokens)} tokens{answer}, {model_name(arguments)} has room for {most}; "
            f"--max-prompt-tokens N keeps the first N tokens of the text"
        )
    model.check_room([len(tokens)], arguments.max_new_tokens)
    return prompt

"""A text with a question behind it, as the tokens that a model reads."""

from __future__ import annotations

from typing import NamedTuple

from minference_jax.generate import LanguageModel

_QUESTION = "\n\n---\n\nQuestion about the text above: "  # without the mark small models go on telling the story


class Prompt(NamedTuple):
    """What the model is to read.

    Attributes:
        tokens: ids.
        is_chat: whether they are in the model's chat template.
    """

    tokens: list[int]
    is_chat: bool


def encode_question(model: LanguageModel, text: str, question: str | None, *, chat: bool = True) -> Prompt:
    """The tokens of a text and a question about it.

    Args:
        model: with a tokenizer.
        text: to be read.
        question: put behind the text; None = the text alone.
        chat: whether to use the model's chat template where it has one.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if question is not None:
        text = f"{text.rstrip()}{_QUESTION}{question}"
    is_chat = chat and bool(getattr(model.tokenizer, "chat_template", None))
    return Prompt(model.encode_chat(text) if is_chat else model.encode(text), is_chat)

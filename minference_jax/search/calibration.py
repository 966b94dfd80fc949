"""Calibration prompts for those who have none of their own: key-value retrieval, and prose to answer a question on.

Retrieval alone misleads: heads that read little in a list of identifiers read much in prose.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable

from minference_jax.generate import LanguageModel
from minference_jax.generate.filling import most_that_fit

CALIBRATION_LENGTH = 30_000
"""Tokens of a generated prompt, where the model can read so many: those of arXiv 2407.02490."""


def calibration_prompts(
    model: LanguageModel, length: int | None = None, *, count: int = 2, seed: int = 0, chat: bool = True
) -> list[list[int]]:
    """Token ids of `count` prompts, in turn those of `retrieval_prompt` and of `manual_prompt`.

    Args:
        model, length, chat: as `retrieval_prompt`.
        count: 1 or more; two show both kinds.
        seed: of the first two; the next two have the next one.

    Raises:
        ValueError: as `retrieval_prompt` and `manual_prompt`, or count is not positive.
    """
    if count < 1:
        raise ValueError(f"{count=} must be 1 or more prompts")
    kinds = (retrieval_prompt, manual_prompt)
    return [kinds[place % 2](model, length, seed=seed + place // 2, chat=chat) for place in range(count)]


def retrieval_prompt(model: LanguageModel, length: int | None = None, *, seed: int = 0, chat: bool = True) -> list[int]:
    """Token ids of a JSON object of random identifiers and the question for the value of one of its keys.

    Args:
        model: its tokenizer makes the tokens.
        length: tokens that the prompt may have, template included; as many pairs are in it as fit. None =
            CALIBRATION_LENGTH or what the model can read, whichever is less.
        seed: of the identifiers and of the question.
        chat: whether to use the model's chat template where the tokenizer has one.

    Raises:
        ValueError: the model has no tokenizer, not one pair fits, or length is more than the model can read.
    """
    return _filled(model, length, chat, lambda pairs: retrieval_text(pairs, seed))


def manual_prompt(model: LanguageModel, length: int | None = None, *, seed: int = 0, chat: bool = True) -> list[int]:
    """Token ids of a part of Python's language reference, as `help` has it, and a question for a number hidden in it.

    Args:
        model, chat: as `retrieval_prompt`.
        length: as for `retrieval_prompt`; as many lines are in it as fit.
        seed: of where the part begins, of the number, and of its place.

    Raises:
        ValueError: as `retrieval_prompt`; length is more than the whole reference fills, or this Python comes without.
    """
    lines, topic, rng = *_manual(seed), random.Random(seed)
    number, depth = rng.randrange(1_000_000, 10_000_000), rng.random()

    def text(count: int) -> str:
        place = int(depth * count)
        hidden = [*lines[:place], f"The number of this manual is {number}.", *lines[place:count]]
        question = f"What does this manual say about {topic}, and what is the number of this manual?"
        return "\n".join([*hidden, "", question])

    return _filled(model, length, chat, text, most=len(lines))


def _manual(seed: int) -> tuple[list[str], str]:
    """The lines of the reference from one of its topics on, round to the topic before it; and that first topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without pydoc_data, its own manual: give calibration prompts") from None
    names = sorted(topics)
    first = random.Random(seed).randrange(len(names))
    return [line for name in names[first:] + names[:first] for line in topics[name].splitlines()], names[first]


def _filled(
    model: LanguageModel, length: int | None, chat: bool, text: Callable[[int], str], most: int | None = None
) -> list[int]:
    """Token ids of the text of so many units that a prompt has no more than `length` tokens."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give calibration prompts as token ids")
    readable = model.config.max_length
    length = min(CALIBRATION_LENGTH, readable) if length is None else length
    if length > readable:
        raise ValueError(
            f"a calibration prompt of {length} tokens is longer than the {readable} that the model can read"
        )

    def encode(units: int) -> list[int]:
        is_chat = chat and model.tokenizer.chat_template
        return model.encode_chat(text(units)) if is_chat else model.encode(text(units))

    what = "a calibration prompt"
    return encode(most_that_fit(lambda units: len(encode(units)), length, most=most, what=what, shortest="takes"))


def retrieval_text(num_pairs: int, seed: int) -> str:
    """A JSON object of so many pairs of identifiers, and the question for the value of one of its keys."""
    rng = random.Random(seed)
    pairs = {str(uuid.UUID(int=rng.getrandbits(128), version=4)): "" for _ in range(num_pairs)}
    pairs = {key: str(uuid.UUID(int=rng.getrandbits(128), version=4)) for key in pairs}
    key = rng.choice(list(pairs))
    return (
        f"This JSON object maps keys to values:\n\n{json.dumps(pairs, indent=0)}\n\n"
        f'Which value belongs to the key "{key}"? Answer with the value alone.'
    )

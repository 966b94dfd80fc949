"""Calibration prompts for those who have none of their own: key-value retrieval, which any pattern must get right."""

from __future__ import annotations

import json
import random
import uuid

from minference_jax.generate import LanguageModel
from minference_jax.generate.filling import most_that_fit

CALIBRATION_LENGTH = 30_000
"""Tokens of a generated prompt, where the model can read so many: those of arXiv 2407.02490."""


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
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give calibration prompts as token ids")
    most = model.config.max_length
    length = min(CALIBRATION_LENGTH, most) if length is None else length
    if length > most:
        raise ValueError(f"a calibration prompt of {length} tokens is longer than the {most} that the model can read")

    def encode(pairs: int) -> list[int]:
        text = retrieval_text(pairs, seed)
        return model.encode_chat(text) if chat and model.tokenizer.chat_template else model.encode(text)

    return encode(most_that_fit(lambda pairs: len(encode(pairs)), length, what="a calibration prompt"))


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

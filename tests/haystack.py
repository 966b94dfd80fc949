"""Needle in a haystack, MInference's variant: a number hidden in real prose at some depth, and a question about it."""

from __future__ import annotations

import bisect
import random
import re
from pathlib import Path
from typing import NamedTuple

NEW_TOKENS = 32
DEPTHS = tuple(i / 9 for i in range(10))  # from before the first sentence to after the last
CITIES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Dublin", "Cairo", "Osaka", "Tunis")


class Haystack(NamedTuple):
    """A prompt with a needle.

    Attributes:
        prompt: token ids, chat template included.
        number: the seven digits that an answer must contain.
    """

    prompt: list[int]
    number: str


def prose() -> str:
    """The beginning of a novel."""
    return (Path(__file__).parents[1] / "examples" / "persuasion.txt").read_text("utf-8")


def haystack(model, length: int, depth: int) -> Haystack:
    """Hides a needle in as many whole sentences of the novel as fit.

    Args:
        model: LanguageModel with a tokenizer and a chat template.
        length: tokens that the prompt may have, chat template included.
        depth: index into DEPTHS; every depth has a city and a number of its own.

    Raises:
        ValueError: the novel is shorter than that.
    """
    city, number = CITIES[depth], str(random.Random(depth).randint(1_000_000, 9_999_999))
    text = prose()
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s)", text)]

    def encode(sentences: int) -> list[int]:
        end = ends[sentences - 1]
        nearest = min((0, *ends[:sentences]), key=lambda place: abs(place - DEPTHS[depth] * end))
        needle = f"\nThe special magic {city} number is: {number}\n"
        hidden = text[:nearest] + needle + text[nearest:end]
        return model.encode_chat(
            f"This is a very long story book: <book> {hidden} </book>.\n"
            f"Based on the content of the book, Question: What is the special magic {city} number?\nAnswer:"
        )

    sentences = bisect.bisect_right(range(1, len(ends) + 1), length, key=lambda count: len(encode(count)))
    if sentences in (0, len(ends)):
        raise ValueError(f"{length=} tokens need more or less than the {len(ends)} sentences that there are")
    return Haystack(encode(sentences), number)


def is_found(model, prefilled, number: str) -> bool:
    """Whether the greedy answer names the number; decoding ends where it does."""
    answer = ""
    for piece in model.stream(prefilled, max_new_tokens=NEW_TOKENS):
        answer += piece
        if number in answer:
            return True
    return False

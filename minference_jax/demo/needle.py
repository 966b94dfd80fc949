"""Built-in examples: a number hidden in a novel at a chosen depth, in a text of a chosen length."""

from __future__ import annotations

import re
from importlib import resources
from typing import NamedTuple

from minference_jax.demo.settings import Refused
from minference_jax.evaluate.niah import CITIES, NEEDLE, QUESTION
from minference_jax.evaluate.samples import generator
from minference_jax.generate import LanguageModel
from minference_jax.generate.filling import most_that_fit
from minference_jax.measure import encode_question

NUMBERS = 1_000_000, 9_999_999  # of the needles


class Example(NamedTuple):
    """A text with a needle.

    Attributes:
        text: prose in whole sentences, with the needle between two of them.
        question: that only the needle answers.
        number: the answer.
        tokens: of text and question as the model reads them.
        length: most tokens, as asked for.
    """

    text: str
    question: str
    number: str
    tokens: int
    length: int


def prose() -> str:
    """The beginning of Jane Austen's Persuasion, in the public domain."""
    return resources.files("minference_jax.demo").joinpath("persuasion.txt").read_text("utf-8")


def make_example(model: LanguageModel, length: int, depth: float, seed: int = 0) -> Example:
    """Hides a needle in as many whole sentences as fit; where the novel's beginning is too short, it comes again.

    Args:
        model: with a tokenizer.
        length: most tokens, those of the question and the chat template included.
        depth: where the needle is, from 0, before the first sentence, to 1, behind the last.
        seed: of city and number.

    Raises:
        Refused: a depth outside 0 to 1, or a length that holds no sentence.
    """
    if not 0 <= depth <= 1:
        raise Refused(f"The depth must be between 0 and 1, not {depth}.")
    random = generator(seed, "demo", length, depth)
    city, number = random.choice(CITIES), str(random.randint(*NUMBERS))
    needle, question = NEEDLE.format(city=city, number=number), QUESTION.format(city=city)
    text = prose()
    per_copy = len(model.encode(text))
    text = "\n\n".join([text.strip()] * (length // per_copy + 1)) + "\n"
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\u201d]*(?=\s)", text)]

    def hidden(sentences: int) -> str:
        end = ends[sentences - 1]
        place = min((0, *ends[:sentences]), key=lambda there: abs(there - depth * end))
        return (text[:place] + needle + text[place:end]).strip()

    def tokens(sentences: int) -> int:
        return len(encode_question(model, hidden(sentences), question).tokens)

    if tokens(1) > length:
        raise Refused(f"{length} tokens are too few for an example: the shortest has {tokens(1)}.")
    count = len(ends)
    if tokens(count) > length:
        count = most_that_fit(tokens, length, most=len(ends), what="example")
    return Example(hidden(count), question, number, tokens(count), length)

"""RULER's eight needle tasks: magic numbers or uuids in noise, in prose or among other needles."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from functools import cache
from random import Random

from minference_jax.evaluate.samples import Question

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
ANSWER = " The special magic {kind} for {query} mentioned in the provided text are"
ONE_TEMPLATE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
)
ONE_ANSWER = " The special magic {kind} for {query} mentioned in the provided text is"
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent of the prose


def needles(
    random: Random,
    units: int,
    *,
    haystack: str,
    words: Sequence[Sequence[str]],
    prose: Sequence[str],
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Question:
    """A question about needles in a haystack of so many lines of noise, other needles, or words of prose.

    Args:
        random: what draws.
        units: lines, or words of prose.
        haystack: "noise", "needles" or "essay".
        words: adjectives and nouns, of which keys are pairs.
        prose: words of the user's text.
        keys, values: "words", "numbers" or "uuids".
        num_keys, num_values, num_queries: keys hidden, values of each, and keys asked for.
    """

    def draw(kind: str) -> str:
        if kind == "words":
            return "-".join(map(random.choice, words))
        if kind == "numbers":
            return str(random.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=random.getrandbits(128), version=4))

    hidden = [(draw(keys), [draw(values) for _ in range(num_values)]) for _ in range(num_keys)]
    lines = [NEEDLE.format(kind=values, key=key, value=value) for key, found in hidden for value in found]
    random.shuffle(lines)
    if haystack == "essay":
        context = _in_prose(random, prose[:units], lines)
    else:
        other = [
            NOISE if haystack == "noise" else NEEDLE.format(kind=values, key=draw(keys), value=draw(values))
            for _ in range(units)
        ]
        for place, line in zip(sorted(random.sample(range(units), len(lines)), reverse=True), lines, strict=True):
            other.insert(place, line)
        context = "\n".join(other)
    asked = random.sample(hidden, num_queries)
    names = [key for key, _ in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    one = num_queries * num_values == 1
    kind = values[:-1] if one else values
    text = (ONE_TEMPLATE if one else TEMPLATE).format(kind=kind, context=context, query=query)
    answers = tuple(value for _, found in asked for value in found)
    return Question((text,), answers, (ONE_ANSWER if one else ANSWER).format(kind=kind, query=query))


def _in_prose(random: Random, words: Sequence[str], lines: Sequence[str]) -> str:
    """The words with the lines between their sentences, at depths drawn from DEPTHS; as published, what stands before
    the first sentence, after the last, or at one place with another line has a space more."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(words))
    places = sorted(int(len(sentences) * depth / 100) for depth in random.sample(DEPTHS, len(lines)))
    parts, last = [], 0
    for place, line in zip(places, lines, strict=True):
        parts += [" ".join(sentences[last:place]), line]
        last = place
    return " ".join([*parts, " ".join(sentences[last:])])


@cache
def word_list(*kinds: str) -> tuple[str, ...]:
    """The words of these kinds ("noun", "adjective", "verb") in wonderwords' lists, sorted, each once.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise ValueError(
            "RULER's words are those of the package wonderwords: pip install 'minference-jax[evaluate]'"
        ) from None
    return tuple(sorted({word for kind in kinds for word in RandomWord().filter(include_categories=[kind])}))

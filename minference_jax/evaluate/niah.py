"""Needle in a haystack, MInference's variant: a number hidden in prose at some depth, and a question about it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial

from minference_jax.evaluate.samples import (
    Question,
    Sample,
    Samples,
    check_counts,
    check_lengths,
    encoder,
    generator,
)
from minference_jax.generate import LanguageModel
from minference_jax.generate.filling import most_that_fit

MAX_NEW_TOKENS = 32
NEEDLE = "\nThe special magic {city} number is: {number}\n"
QUESTION = "What is the special magic {city} number?"
TEMPLATE = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n{context}\n\nQuestion: {question} Don't give information outside the document or repeat your "
    "findings. Keep your response short and direct. Answer: "
)
CITIES = (
    *("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Dublin", "Cairo", "Osaka", "Tunis", "Vienna", "Seoul"),
    *("Dakar", "Sofia", "Havana", "Bogota", "Warsaw", "Amman", "Bergen", "Perth", "Accra", "Delhi", "Geneva", "Riga"),
)


def niah_samples(
    model: LanguageModel,
    text: str,
    lengths: Sequence[int],
    *,
    depths: int = 10,
    rounds: int = 1,
    seed: int = 42,
    template: str = TEMPLATE,
    chat: bool | None = None,
) -> Samples:
    """Needles in a haystack: for each length and round one prompt for each depth, filled with whole sentences.

    Args:
        model: with a tokenizer.
        text: prose that the haystacks are made of; each round starts at another sentence and goes round.
        lengths: tokens of prompt and answer together.
        depths: number of needle places, evenly from before the first sentence to after the last.
        rounds: prompts for each length and depth, each with a city and a number of its own.
        seed: of cities and numbers.
        template: what the user's message says, with {context} and {question}; MInference's own is hard on small models.
        chat: as in `minference_jax.evaluate.samples.encoder`.

    Raises:
        ValueError: a count below 1, a template that lacks one of its two, a text without sentences or shorter than the
            longest prompt, a length that not even one sentence fits or that is beyond the model's context, a model
            without tokenizer. At the call, not at the first sample.

    Source: arXiv 2407.02490, section 4.2, and microsoft/MInference, experiments/needle_in_a_haystack: texts, number of
    new tokens and score; the haystack is the caller's, cut at sentences.
    """
    check_counts(depths=depths, rounds=rounds)
    check_lengths(model, lengths)
    if not {"{context}", "{question}"} <= set(re.findall(r"\{\w+\}", template)):
        raise ValueError(f"{template=} must hold {{context}} and {{question}}")
    starts = [0, *(match.end() for match in re.finditer(r"[.!?][\"')\u201d]*\s+", text))]
    if len(starts) < 2:
        raise ValueError("the haystack has no sentence: it needs prose whose sentences end in . ! or ?")
    encode = encoder(model, chat)

    def make(length: int, turn: int, places: Sequence[int] = range(depths)) -> Iterator[Sample]:
        start = starts[turn * len(starts) // rounds]
        turned = text[start:] + text[:start]
        ends = [match.end() for match in re.finditer(r"[.!?][\"')\u201d]*(?=\s|$)", turned)]
        for place in places:
            depth = place / (depths - 1) if depths > 1 else 0.5
            random = generator(seed, "niah", length, turn, place)
            city, number = random.choice(CITIES), str(random.randint(1_000_000, 9_999_999))
            ask = partial(_question, turned, ends, depth, template, (city, number))

            def tokens(sentences: int, ask=ask) -> int:
                return len(encode(ask(sentences))) + MAX_NEW_TOKENS

            count = most_that_fit(tokens, length, most=len(ends), what="niah")
            index = turn * depths + place
            yield Sample(
                task="niah",
                length=length,
                index=index,
                context=index,
                prompt=tuple(encode(ask(count))),
                answers=(number,),
                metric="contains_all",
                max_new_tokens=MAX_NEW_TOKENS,
                about={"depth": depth},
            )

    for length in lengths:
        next(make(length, 0, range(1)))  # one that is too short or too long is to be said now
    return Samples(list(itertools.product(lengths, range(rounds))), make, len(lengths) * rounds * depths)


def _question(
    text: str, ends: Sequence[int], depth: float, template: str, hidden: tuple[str, str], sentences: int
) -> Question:
    """The needle at the sentence end that is nearest to its depth among the first sentences."""
    end = ends[sentences - 1]
    nearest = min((0, *ends[:sentences]), key=lambda place: abs(place - depth * end))
    city, number = hidden
    context = text[:nearest] + NEEDLE.format(city=city, number=number) + text[nearest:end]
    message = template.replace("{question}", QUESTION.format(city=city)).replace("{context}", context)
    return Question((message,), (number,))

"""One question of a benchmark, its prompt in the model's chat template, and prompts filled up to a length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from minference_jax.evaluate.metrics import METRICS
from minference_jax.generate import LanguageModel

Encode: TypeAlias = Callable[["Question"], list[int]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with what a right answer holds.

    Attributes:
        task: name of the benchmark's task.
        length: tokens that the prompt and the longest answer may have together.
        index: which of the task's samples of this length it is.
        context: samples of a task and length with the same number ask about one context, and their prompts begin alike.
        prompt: token ids, chat template included.
        answers: what the metric compares the model's answer with.
        metric: a name of `minference_jax.evaluate.metrics.METRICS`.
        max_new_tokens: most tokens of an answer.
        about: what else a report groups by, such as the depth of a needle; plain JSON.
    """

    task: str
    length: int
    index: int
    context: int
    prompt: tuple[int, ...]
    answers: tuple[Any, ...]
    metric: str
    max_new_tokens: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names("metric", (self.metric,), tuple(METRICS))


class Samples(Iterable[Sample]):
    """Samples that are made when they are asked for; how many there are is known before.

    Args:
        parts: what `make` is called with, one after the other.
        make: gives the samples of a part.
        count: of all samples.
    """

    def __init__(self, parts: Sequence[tuple[Any, ...]], make: Callable[..., Iterable[Sample]], count: int):
        self._parts, self._make, self._count = parts, make, count

    def __iter__(self) -> Iterator[Sample]:
        for part in self._parts:
            yield from self._make(*part)

    def __len__(self) -> int:
        return self._count


class Question(NamedTuple):
    """What a model is asked, as text.

    Attributes:
        messages: texts of user and assistant in turns, the user's first and last.
        answers: what the metric compares the model's answer with.
        answer_prefix: how the answer starts; it stands after the assistant's header.
    """

    messages: tuple[str, ...]
    answers: tuple[Any, ...]
    answer_prefix: str = ""


def encoder(model: LanguageModel, chat: bool | None = None) -> Encode:
    """What makes token ids of a question.

    Args:
        model: with a tokenizer.
        chat: True = in the model's chat template; False = plain text, the assistant's turns right after the user's and
            a line end between two rounds; None = in the template where the model has one.

    Raises:
        ValueError: the model has no tokenizer, or it has no chat template and `chat` is True.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so it can't read the questions of a benchmark")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return lambda question: model.encode(_plain(question.messages) + question.answer_prefix)
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: ask for plain text with chat=False")

    def encode(question: Question) -> list[int]:
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(question.messages)]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prefix = question.answer_prefix.lstrip("\n")  # those part it from the question in plain text
        return list(tokenizer.encode(text + prefix, add_special_tokens=False))

    return encode


def _plain(messages: Sequence[str]) -> str:
    rounds = ["".join(messages[i : i + 2]) for i in range(0, len(messages), 2)]
    return "\n".join(rounds)


def check_counts(**counts: int) -> None:
    """Refuses what is not an integer of at least 1, by its name."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a name that is not known, or is there twice."""
    for place, name in enumerate(names):
        if name not in known:
            raise ValueError(f"{kind} {name!r} is not one of {', '.join(known)}")
        if name in names[:place]:
            raise ValueError(f"{kind} {name!r} is given twice")


def check_lengths(model: LanguageModel, lengths: Sequence[int]) -> None:
    """Refuses lengths that are no counts, are there twice, or are beyond what the model can read."""
    check_counts(**{f"lengths[{i}]": length for i, length in enumerate(lengths)})
    most = model.config.max_length
    for place, length in enumerate(lengths):
        if length > most:
            raise ValueError(f"{length=} is beyond the model's context of {most} tokens")
        if length in lengths[:place]:
            raise ValueError(f"{length=} is given twice")


def generator(*parts: object) -> random.Random:
    """Random numbers that depend on these parts alone, so that any sample can be made again without the others."""
    return random.Random("/".join(map(str, parts)))

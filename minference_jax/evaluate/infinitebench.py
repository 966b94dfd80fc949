"""InfiniteBench: the six synthetic tasks at any length, and prompts of all twelve from the benchmark's own files."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minference_jax.evaluate.infinitebench_tasks import SYNTHETIC, Context
from minference_jax.evaluate.metrics import rouge_scorer
from minference_jax.evaluate.samples import (
    Encode,
    Question,
    Sample,
    Samples,
    check_counts,
    check_lengths,
    check_names,
    encoder,
    generator,
)
from minference_jax.generate import LanguageModel
from minference_jax.generate.filling import most_that_fit
from minference_jax.patterns.heads import at
from minference_jax.short_repr import short_repr


class _Task(NamedTuple):
    """A task's prompt, the start of its answer, most tokens of an answer, and its metric."""

    template: str
    answer_prefix: str
    max_new_tokens: int
    metric: str


_HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it{more}. I will quiz you about the "
    "important information{there}.\n\n{{context}}\n\n{{input}}"
)
_OPTIONS = "\nA. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}\n\n"
_TASKS = {
    "passkey": _Task(_HIDDEN.format(more=" and memorize it", there=""), "\n\nThe pass key is", 6, "first_integer"),
    "number_string": _Task(
        _HIDDEN.format(more="", there=" there"), "\n\nThe sequence of digits is", 12, "first_integer"
    ),
    "kv_retrieval": _Task(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        "",
        50,
        "is_word",
    ),
    "math_find": _Task("What is {target} in the following list?\n\n{context}\n\n{input}", "", 3, "first_number"),
    "math_calc": _Task(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}",
        "\nValues:",
        30000,
        "leading_integers",
    ),
    "code_run": _Task(
        "There is a function called {function} in the following Python code.\n\n{context}\n\nPlease compute the exact "
        "value of {call}.",
        " The value of {call} is",
        5,
        "last_integer",
    ),
    "code_debug": _Task(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n{context}\n\nOptions:" + _OPTIONS.rstrip("\n"),
        "\n\nThe correct option is:",
        5,
        "code_choice",
    ),
    "longbook_sum_eng": _Task("Summarize the book below.\n\n{context}", "\n\nSummary:", 1200, "rouge_l_sum"),
    "longbook_choice_eng": _Task(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}" + _OPTIONS.rstrip("\n"),
        "\n\nThe letter of the correct answer is",
        40,
        "choice",
    ),
    "longbook_qa_eng": _Task(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}",
        "\nAnswer:",
        40,
        "f1_words",
    ),
    "longbook_qa_chn": _Task("阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}", "\n答案：", 40, "f1_signs"),
    "longdialogue_qa_eng": _Task(
        "Below is a dialogue script where one random occurrence of a character name is replaced with "
        '"$$MASK$$", and you should try to guess who that character is.\n\n{context}',
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
        40,
        "is_name",
    ),
}
INFINITEBENCH_TASKS = tuple(_TASKS)
"""Names of the twelve tasks; those of `SYNTHETIC` can be made at any length, all can be read from files."""


def infinitebench_samples(
    model: LanguageModel,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    samples: int = 100,
    questions: int = 1,
    seed: int = 42,
    chat: bool | None = None,
) -> Samples:
    """Samples of InfiniteBench's synthetic tasks, made anew, each prompt filled as far as its length goes.

    Args:
        model: with a tokenizer.
        tasks: names of SYNTHETIC: passkey, number_string, kv_retrieval, math_find, math_calc, code_run.
        lengths: tokens of prompt and answer together.
        samples: for each task and length.
        questions: how many samples in a row ask about one context; more than 1 for kv_retrieval only.
        seed: of everything random.
        chat: as in `minference_jax.evaluate.samples.encoder`.

    Raises:
        ValueError: an unknown task, a count below 1, several questions for a task that has one, a length that is too
            short or beyond the model's context. At the call, not at the first sample.

    Source: arXiv 2402.13718 and its code, OpenBMB/InfiniteBench, with the prompts that microsoft/MInference uses; how
    the lists, expressions and functions are drawn is ours. math_calc may say as many tokens as its answer has.
    """
    check_names("task", tasks, tuple(SYNTHETIC))
    check_counts(samples=samples, questions=questions)
    check_lengths(model, lengths)
    for task in tasks:
        if questions > 1 and not SYNTHETIC[task].has_many_questions:
            raise ValueError(f"{questions=}: a context of {task} has one question only")
    encode = encoder(model, chat)

    def make(task: str, length: int, first: int) -> Iterator[Sample]:
        several = range(first, min(first + questions, samples))
        return _about_one_context(task, length, several, encode, model, (seed, task, length, first))

    for task, length in itertools.product(tasks, lengths):
        next(make(task, length, 0))  # a length that is too short is to be said now
    parts = list(itertools.product(tasks, lengths, range(0, samples, questions)))
    return Samples(parts, make, len(tasks) * len(lengths) * samples)


def _about_one_context(
    task: str, length: int, indices: range, encode: Encode, model: LanguageModel, seed: tuple[object, ...]
) -> Iterator[Sample]:
    """Samples about one context that is filled so far that the longest of their prompts still fits."""

    def made(units: int) -> list[tuple[Question, int]]:
        draw: random.Random = generator(*seed)
        context: Context = SYNTHETIC[task].make(draw, units)
        fields = [{"context": context.text, **context.ask(draw)} for _ in indices]
        return [(question, _answer_tokens(task, question, model)) for question in map(_asker(task), fields)]

    def tokens(units: int) -> int:
        return max(len(encode(question)) + new for question, new in made(units))

    units = most_that_fit(tokens, length, least=SYNTHETIC[task].least, what=task)
    for index, (question, new) in zip(indices, made(units), strict=True):
        yield Sample(
            task=task,
            length=length,
            index=index,
            context=indices[0],
            prompt=tuple(encode(question)),
            answers=question.answers,
            metric=_TASKS[task].metric,
            max_new_tokens=new,
        )


def read_infinitebench(
    model: LanguageModel,
    file: str | os.PathLike[str],
    task: str,
    *,
    length: int | None = None,
    samples: int | None = None,
    truncate_middle: bool = False,
    chat: bool | None = None,
) -> Samples:
    """Samples of one of InfiniteBench's twelve tasks from its own file of JSON lines.

    Args:
        model: with a tokenizer.
        file: JSON lines with context, input, answer and options.
        task: a name of INFINITEBENCH_TASKS.
        length: tokens of prompt and answer together; None = the model's context.
        samples: the first so many lines, or as many as there are; None = all.
        truncate_middle: take as many tokens out of the middle of a longer prompt as it has too many (MInference does,
            at 160,000); False = refuse it. What was taken out is counted in `about`.
        chat: as in `minference_jax.evaluate.samples.encoder`.

    Raises:
        ValueError: an unknown task, a length beyond the model's context, a damaged line, no line, a prompt that is too
            long, a task whose scores need a package that is not installed. At the call, not at the first sample.
        OSError: the file can't be read.

    Source: as `infinitebench_samples`.
    """
    check_names("task", (task,), INFINITEBENCH_TASKS)
    limit = model.config.max_length if length is None else length
    check_counts(samples=1 if samples is None else samples)
    check_lengths(model, (limit,))
    if _TASKS[task].metric == "rouge_l_sum":
        rouge_scorer()
    encode, ask = encoder(model, chat), _asker(task)

    def make() -> Iterator[Sample]:
        contexts: dict[str, int] = {}
        for index, (number, fields) in enumerate(itertools.islice(_lines(file), samples)):
            with at(f"{file}, line {number}"):
                question = ask(fields)
                new = _answer_tokens(task, question, model)
                prompt, cut = _fitted(encode(question), new, limit, truncate_middle)
            yield Sample(
                task=task,
                length=limit,
                index=index,
                context=contexts.setdefault(fields["context"], index),
                prompt=tuple(prompt),
                answers=question.answers,
                metric=_TASKS[task].metric,
                max_new_tokens=new,
                about={"truncated_tokens": cut},
            )

    count = sum(1 for _ in make())  # a damaged line and a prompt that is too long are to be said now
    if not count:
        raise ValueError(f"{file} holds no sample")
    return Samples([()], make, count)


def _lines(file: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the fields of every line that is not blank."""
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with at(f"{file}, line {number}"):
                try:
                    fields = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"it is not UTF-8 text: {error}") from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"it is not JSON: {error}") from None
                if not isinstance(fields, dict) or not isinstance(fields.get("context"), str):
                    raise ValueError("it must be an object whose context is a text")
            yield number, fields


def _fitted(prompt: list[int], new: int, limit: int, truncate_middle: bool) -> tuple[list[int], int]:
    """A prompt that has room for an answer of `new` tokens, and how many tokens were taken out of its middle."""
    excess = max(len(prompt) + new - limit, 0)
    if excess and not truncate_middle:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and its answer up to {new}, more than length={limit}: ask for "
            f"truncate_middle to take tokens out of the middle"
        )
    if excess >= len(prompt):
        raise ValueError(f"length={limit} has no room for an answer of {new} tokens")
    head = (len(prompt) - excess) // 2
    return prompt[:head] + prompt[head + excess :], excess


def _answer_tokens(task: str, question: Question, model: LanguageModel) -> int:
    """Most tokens of an answer: of math_calc no more than the true one takes, since nothing after it counts."""
    most = _TASKS[task].max_new_tokens
    if task != "math_calc":
        return most
    return min(most, len(model.tokenizer.encode(f" {list(question.answers)}", add_special_tokens=False)))


_KINDS: dict[str, tuple[type, ...]] = {"first_number": (int, float), "last_integer": (int,), "leading_integers": (int,)}
"""Of what type the answers are that a metric compares with; elsewhere texts."""


def _asker(task: str) -> Callable[[Mapping[str, Any]], Question]:
    """What makes a question of a line's fields; it raises ValueError where they are not those of the task."""
    recipe = _TASKS[task]

    def ask(fields: Mapping[str, Any]) -> Question:
        known = dict(fields)
        answers = _needed(fields, "answer", object)
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or any(type(one) not in _KINDS.get(recipe.metric, (str,)) for one in answers):
            what = " or ".join(kind.__name__ for kind in _KINDS.get(recipe.metric, (str,)))
            raise ValueError(f"answer={short_repr(fields['answer'])} must be of type {what}, or a list of such")
        if "{input}" in recipe.template or task in ("math_find", "code_run"):
            _needed(fields, "input", str)
        if task == "math_find":
            known["target"] = "the " + _found(r"The (.+) of", fields["input"])[1].lower()
        if task == "code_run":
            known["call"] = _found(r"func_[0-9]+\(-?[0-9]+\)", fields["input"])[0]
            known["function"] = known["call"].partition("(")[0]
        if "{options[0]}" in recipe.template:
            answers = _with_letter(answers, _needed(fields, "options", list))
        text, prefix = recipe.template.format_map(known), recipe.answer_prefix.format_map(known)
        begun = re.search(r"\s(The [^\n]* is:\s*)$", text)
        if not prefix and begun:  # kv_retrieval's and math_find's inputs end with how the answer starts
            text, prefix = text[: begun.start()], text[begun.start() :]
        return Question((text,), tuple(answers), prefix)

    return ask


def _needed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if value is None or not isinstance(value, kind):
        raise ValueError(f"{name}={short_repr(value)} must be {'there' if kind is object else f'a {kind.__name__}'}")
    return value


def _with_letter(answers: list[str], options: list[str]) -> list[str]:
    """The right option and its letter; a file may name both."""
    if len(options) != 4 or not all(isinstance(one, str) for one in options):
        raise ValueError(f"options={short_repr(options)} must be four texts")
    if len(answers) == 2 and answers[1] in "ABCD":
        return answers
    if len(answers) != 1 or answers[0] not in options:
        raise ValueError(f"answer={short_repr(answers)} must be one of the options")
    return [answers[0], "ABCD"[options.index(answers[0])]]


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"input={short_repr(text)} does not hold {pattern}")
    return found

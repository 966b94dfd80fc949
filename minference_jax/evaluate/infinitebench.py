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
from minference_jax.evaluate.samples import (
    Encode,
    Question,
    Sample,
    check_counts,
    check_names,
    encoder,
    generator,
    most_that_fit,
)
from minference_jax.generate import LanguageModel


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
) -> Iterator[Sample]:
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
            short.

    Source: arXiv 2402.13718 and its code, OpenBMB/InfiniteBench, with the prompts that microsoft/MInference uses; how
    the lists, expressions and functions are drawn is ours. math_calc may say as many tokens as its answer has.
    """
    check_names("task", tasks, tuple(SYNTHETIC))
    check_counts(samples=samples, questions=questions, **{f"lengths[{i}]": n for i, n in enumerate(lengths)})
    for task in tasks:
        if questions > 1 and not SYNTHETIC[task].has_many_questions:
            raise ValueError(f"{questions=}: a context of {task} has one question only")
    encode = encoder(model, chat)
    for task, length in itertools.product(tasks, lengths):
        for first in range(0, samples, questions):
            several = range(first, min(first + questions, samples))
            yield from _about_one_context(task, length, several, encode, model, (seed, task, length, first))


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
) -> Iterator[Sample]:
    """Samples of one of InfiniteBench's twelve tasks from its own file of JSON lines.

    Args:
        model: with a tokenizer.
        file: JSON lines with context, input, answer and options.
        task: a name of INFINITEBENCH_TASKS.
        length: tokens of prompt and answer together; None = the model's context.
        samples: the first so many lines; None = all.
        truncate_middle: take as many tokens out of the middle of a longer prompt as it has too many (MInference does,
            at 160,000); False = refuse it. What was taken out is counted in `about`.
        chat: as in `minference_jax.evaluate.samples.encoder`.

    Raises:
        ValueError: an unknown task, a damaged line, a prompt that is too long.
        OSError: the file can't be read.

    Source: as `infinitebench_samples`.
    """
    check_names("task", (task,), INFINITEBENCH_TASKS)
    limit = model.config.max_length if length is None else length
    check_counts(length=limit, samples=1 if samples is None else samples)
    encode, ask = encoder(model, chat), _asker(task)
    contexts: dict[str, int] = {}
    with Path(file).open(encoding="utf-8") as lines:
        for index, line in enumerate(itertools.islice((line for line in lines if line.strip()), samples)):
            try:
                fields = json.loads(line)
                question = ask(fields)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                reason = f"{type(error).__name__} {error}"
                raise ValueError(f"{file}: sample {index} is none of {task}: {reason}") from None
            new = _answer_tokens(task, question, model)
            prompt = encode(question)
            excess = len(prompt) + new - limit
            if excess > 0 and not truncate_middle:
                raise ValueError(
                    f"{file}: sample {index} has {len(prompt)} tokens and its answer up to {new}, more than "
                    f"length={limit}: ask for truncate_middle to take tokens out of the middle"
                )
            if excess >= len(prompt):
                raise ValueError(f"{file}: length={limit} has no room for an answer of {new} tokens")
            head = (len(prompt) - max(excess, 0)) // 2
            yield Sample(
                task=task,
                length=limit,
                index=index,
                context=contexts.setdefault(fields["context"], index),
                prompt=tuple(prompt[:head] + prompt[head + max(excess, 0) :]),
                answers=question.answers,
                metric=_TASKS[task].metric,
                max_new_tokens=new,
                about={"truncated_tokens": max(excess, 0)},
            )


def _answer_tokens(task: str, question: Question, model: LanguageModel) -> int:
    """Most tokens of an answer: of math_calc no more than the true one takes, since nothing after it counts."""
    most = _TASKS[task].max_new_tokens
    if task != "math_calc":
        return most
    return min(most, len(model.tokenizer.encode(f" {list(question.answers)}", add_special_tokens=False)))


def _asker(task: str) -> Callable[[Mapping[str, Any]], Question]:
    """What makes a question of a line's fields; it raises KeyError, TypeError, IndexError or ValueError."""
    recipe = _TASKS[task]

    def ask(fields: Mapping[str, Any]) -> Question:
        known = dict(fields)
        answers = fields["answer"] if isinstance(fields["answer"], list) else [fields["answer"]]
        if task == "math_find":
            known["target"] = "the " + _found(r"The (.+) of", fields["input"])[1].lower()
        if task == "code_run":
            known["call"] = _found(r"func_[0-9]+\(-?[0-9]+\)", fields["input"])[0]
            known["function"] = known["call"].partition("(")[0]
        if task in ("code_debug", "longbook_choice_eng") and len(answers) == 1:
            answers = [answers[0], "ABCD"[fields["options"].index(answers[0])]]
        text, prefix = recipe.template.format_map(known), recipe.answer_prefix.format_map(known)
        begun = re.search(r"\s(The [^\n]* is:\s*)$", text)
        if not prefix and begun:  # kv_retrieval's and math_find's inputs end with how the answer starts
            text, prefix = text[: begun.start()], text[begun.start() :]
        if not answers:
            raise ValueError("no answer")
        return Question((text,), tuple(answers), prefix)

    return ask


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{text!r} does not hold {pattern}")
    return found

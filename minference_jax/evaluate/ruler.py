"""RULER's thirteen tasks: which there are, what they need, and their prompts filled up to a length."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from minference_jax.evaluate import ruler_needles, ruler_words
from minference_jax.evaluate.ruler_qa import QaSource, read_hotpotqa, read_squad
from minference_jax.evaluate.samples import (
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

NO_CORPUS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""The tasks that are made of nothing but random words and numbers."""
ESSAY = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""The tasks whose haystack is prose that the user gives."""
QA = ("qa_1", "qa_2")
"""The tasks about documents that the user gives: SQuAD 2.0 and HotpotQA."""
RULER_TASKS = (*NO_CORPUS, *ESSAY, *QA)

_NEEDLES: dict[str, dict[str, object]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {"haystack": "essay"},
    "niah_single_3": {"haystack": "essay", "values": "uuids"},
    "niah_multikey_1": {"haystack": "essay", "num_keys": 4},
    "niah_multikey_2": {"haystack": "needles"},
    "niah_multikey_3": {"haystack": "needles", "keys": "uuids", "values": "uuids"},
    "niah_multivalue": {"haystack": "essay", "num_values": 4},
    "niah_multiquery": {"haystack": "essay", "num_keys": 4, "num_queries": 4},
}


class _Recipe(NamedTuple):
    """How a task's prompts are made: (generator, units, index) -> Question, and bounds of units."""

    ask: Callable[[random.Random, int, int], Question]
    max_new_tokens: int
    least: int = 1
    most: int | None = None
    metric: str = "contains_all"


def ruler_samples(
    model: LanguageModel,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    samples: int = 500,
    seed: int = 42,
    essays: str | None = None,
    squad: str | os.PathLike[str] | None = None,
    hotpotqa: str | os.PathLike[str] | None = None,
    chat: bool | None = None,
) -> Samples:
    """Samples of RULER's tasks, each prompt filled as far as its length goes.

    Args:
        model: with a tokenizer.
        tasks: names of RULER_TASKS.
        lengths: tokens of prompt and generated tokens together; below 4096 cwe has fewer repetitions.
        samples: for each task and length.
        seed: of everything random.
        essays: prose for the tasks of ESSAY; None = none is given.
        squad: file of SQuAD 2.0 (JSON) for qa_1; None = none is given.
        hotpotqa: file of HotpotQA (JSON, distractor setting) for qa_2; None = none is given.
        chat: as in `minference_jax.evaluate.samples.encoder`.

    Raises:
        ValueError: an unknown task, a count below 1, a file or word list that a task needs and that is not given or is
            damaged, a file that no task needs, a length that is too short, too long for what there is to fill it with,
            or beyond the model's context. At the call, not at the first sample.
        OSError: a file can't be read.

    Source: arXiv 2404.06654 and its code, NVIDIA/RULER: texts, sizes and scores are theirs. The random draws are ours,
    and a prompt is filled to the last unit that fits, where theirs stops at a coarse step.
    """
    check_names("task", tasks, RULER_TASKS)
    check_counts(samples=samples)
    check_lengths(model, lengths)
    for name, given, users in (("essays", essays, ESSAY), ("squad", squad, QA[:1]), ("hotpotqa", hotpotqa, QA[1:])):
        if given is not None and not set(users) & set(tasks):
            raise ValueError(f"{name} is for {', '.join(users)}, none of which is among the tasks")
    encode = encoder(model, chat)
    sources = {name: _qa_source(name, squad, hotpotqa) for name in QA if name in tasks}
    for name, source in sources.items():
        if samples > len(source.asked):
            raise ValueError(f"{samples=} are asked for, the file of {name} has {len(source.asked)} questions")

    def make(task: str, length: int, indices: Sequence[int] = range(samples)) -> Iterator[Sample]:
        recipe = _recipe(task, length, essays, sources)
        for index in indices:

            def ask(units: int, where=(seed, task, length, index)) -> Question:
                return recipe.ask(generator(*where), units, where[-1])

            def tokens(units: int, ask=ask) -> int:
                return len(encode(ask(units))) + recipe.max_new_tokens

            question = ask(most_that_fit(tokens, length, least=recipe.least, most=recipe.most, what=task))
            yield Sample(
                task=task,
                length=length,
                index=index,
                context=index,
                prompt=tuple(encode(question)),
                answers=question.answers,
                metric=recipe.metric,
                max_new_tokens=recipe.max_new_tokens,
            )

    parts = list(itertools.product(tasks, lengths))
    for part in parts:
        next(make(*part, range(1)))  # what a task lacks, and a length that does not do, are to be said now
    return Samples(parts, make, len(parts) * samples)


def _recipe(task: str, length: int, essays: str | None, sources: dict[str, QaSource]) -> _Recipe:
    if task in sources:
        source = sources[task]
        return _Recipe(source.ask, 32, source.fewest, len(source.documents), "contains_any")
    if task == "vt":
        return _Recipe(_alone(ruler_words.variable_tracking), 30, ruler_words.HOPS + 2)
    if task == "cwe":
        words = ruler_words.common_word_list()
        return _Recipe(_alone(partial(ruler_words.common_words, words, length < 4096)), 120, 11, len(words))
    if task == "fwe":
        vocabulary = max(length // 50, 4)  # noise and the three words that are asked for
        return _Recipe(_alone(partial(ruler_words.frequent_words, vocabulary)), 50, 16)
    options = dict(_NEEDLES[task])
    kinds = () if options.get("keys") == "uuids" else ("adjective", "noun")
    pairs = tuple(ruler_needles.word_list(kind) for kind in kinds)
    prose: tuple[str, ...] = ()
    if options["haystack"] == "essay":
        if essays is None:
            raise ValueError(f"{task} needs prose to hide its needles in: give essays")
        prose = tuple(essays.split())
    ask = partial(ruler_needles.needles, words=pairs, prose=prose, **options)  # type: ignore[arg-type]
    needles = max(int(str(options.get("num_keys", 1))), int(str(options.get("num_values", 1))))
    return _Recipe(_alone(ask), 128, needles, len(prose) or None)


def _alone(ask: Callable[[random.Random, int], Question]) -> Callable[[random.Random, int, int], Question]:
    """For tasks whose samples do not depend on their index."""
    return lambda random, units, index: ask(random, units)


def _qa_source(task: str, squad: str | os.PathLike[str] | None, hotpotqa: str | os.PathLike[str] | None) -> QaSource:
    file, option, read = (squad, "squad", read_squad) if task == "qa_1" else (hotpotqa, "hotpotqa", read_hotpotqa)
    if file is None:
        raise ValueError(f"{task} needs the data set's own file: give {option}")
    return read(file)

"""RULER's two QA tasks: the user's files of SQuAD 2.0 and HotpotQA, and a question among other documents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from minference_jax.evaluate.samples import Question

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
ANSWER = " Answer:"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A question, its answers, and which documents hold it or stand close to those."""

    query: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    close: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QaSource:
    """Documents and questions of a data set.

    Attributes:
        documents: texts, each once.
        asked: the questions, in the file's order.
    """

    documents: tuple[str, ...]
    asked: tuple[_Asked, ...]

    @property
    def fewest(self) -> int:
        """The documents that every prompt must have room for: those that hold the answer."""
        return max(len(asked.own) for asked in self.asked)

    def ask(self, random: Random, units: int, index: int) -> Question:
        """The question of that index among `units` documents: its own, then close ones, then any.

        Raises:
            ValueError: there are not so many questions.
        """
        if index >= len(self.asked):
            raise ValueError(f"sample {index} was asked for, the file has {len(self.asked)} questions")
        asked = self.asked[index]
        wanted = max(units - len(asked.own), 0)
        if wanted > len(asked.close):
            taken = {*asked.own, *asked.close}
            rest = [i for i in range(len(self.documents)) if i not in taken]
            chosen = [*asked.close, *random.sample(rest, min(wanted - len(asked.close), len(rest)))]
        else:
            chosen = random.sample(asked.close, wanted)
        documents = [self.documents[i] for i in (*asked.own, *chosen)]
        random.shuffle(documents)
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        return Question((TEMPLATE.format(context=context, query=asked.query),), asked.answers, ANSWER)


def read_squad(file: str | os.PathLike[str]) -> QaSource:
    """The answerable questions of a SQuAD 2.0 file.

    Raises:
        ValueError: it is no such file.
        OSError: it can't be read.
    """

    def read(content: Any) -> QaSource:
        articles = [[part["context"] for part in article["paragraphs"]] for article in content["data"]]
        documents = sorted({text for article in articles for text in article})
        number = {text: i for i, text in enumerate(documents)}
        asked = []
        for article, texts in zip(content["data"], articles, strict=True):
            for part in article["paragraphs"]:
                own = number[part["context"]]
                close = tuple(dict.fromkeys(number[text] for text in texts if number[text] != own))
                for one in part["qas"]:
                    if not one["is_impossible"]:
                        answers = tuple(answer["text"] for answer in one["answers"])
                        asked.append(_Asked(query=one["question"], answers=answers, own=(own,), close=close))
        return QaSource(documents=tuple(documents), asked=tuple(asked))

    return _read(file, "SQuAD 2.0", read)


def read_hotpotqa(file: str | os.PathLike[str]) -> QaSource:
    """The questions of a HotpotQA file in the distractor setting.

    Raises:
        ValueError: it is no such file.
        OSError: it can't be read.
    """

    def read(content: Any) -> QaSource:
        texts = [[f"{title}\n{''.join(parts)}" for title, parts in one["context"]] for one in content]
        documents = sorted({text for several in texts for text in several})
        number = {text: i for i, text in enumerate(documents)}
        asked = [
            _Asked(
                query=one["question"], answers=(one["answer"],), own=tuple(dict.fromkeys(number[t] for t in several))
            )
            for one, several in zip(content, texts, strict=True)
        ]
        return QaSource(documents=tuple(documents), asked=tuple(asked))

    return _read(file, "HotpotQA", read)


def _read(file: str | os.PathLike[str], kind: str, read: Callable[[Any], QaSource]) -> QaSource:
    try:
        source = read(json.loads(Path(file).read_text("utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a file of {kind}: {type(error).__name__} {error}") from None
    if not source.asked:
        raise ValueError(f"{file} has no question")
    return source

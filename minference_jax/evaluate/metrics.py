"""Scores of answers, each from 0 to 1: METRICS holds them by name."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

Metric: TypeAlias = Callable[[str, Sequence[Any]], float]


def contains_all(said: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in what was said, whatever the case. NIAH's score, and RULER's but for QA."""
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


def contains_any(said: str, answers: Sequence[str]) -> float:
    """1 where one of the answers stands in what was said, whatever the case. RULER's score of QA."""
    return float(any(answer.lower() in said.lower() for answer in answers))


def first_integer(said: str, answers: Sequence[str]) -> float:
    """1 where the first run of digits is the answer. InfiniteBench's passkey and number_string."""
    found = re.search(r"[0-9]+", said)
    return float(found is not None and found[0] == answers[0])


def is_word(said: str, answers: Sequence[str]) -> float:
    """1 where the answer is a word of what was said, punctuation, </s>, The and To being blanks.

    InfiniteBench's kv_retrieval, as microsoft/MInference scores it.
    """
    return float(answers[0] in re.sub(r"[\n:\"'.,?!{}]|</s>|The|To", " ", said).split())


def first_number(said: str, answers: Sequence[float]) -> float:
    """1 where the first number, with or without decimals, is the answer; to an integer's, decimals are cut off.

    InfiniteBench's math_find, as microsoft/MInference scores it.
    """
    found = re.search(r"[0-9]+(\.[0-9]+)?", said)
    if found is None:
        return 0.0
    number = Decimal(found[0])
    return float((int(number) if isinstance(answers[0], int) else float(number)) == answers[0])


def leading_integers(said: str, answers: Sequence[int]) -> float:
    """Share of the answers that are said before the first wrong number; no sign is read. InfiniteBench's math_calc."""
    numbers = [int(digits) for digits in re.findall(r"[0-9]+", said)]
    right = 0
    for number, answer in zip(numbers, answers, strict=False):
        if number != answer:
            break
        right += 1
    return right / len(answers)


def last_integer(said: str, answers: Sequence[int]) -> float:
    """1 where the last word is the answer as an integer. InfiniteBench's code_run."""
    words = re.sub(r"[\n.`'\":]", " ", said).split()
    return float(bool(words) and re.fullmatch(r"[+-]?[0-9]+", words[-1]) is not None and int(words[-1]) == answers[0])


def is_name(said: str, answers: Sequence[str]) -> float:
    """1 where the first answer is a word of what was said in capitals. InfiniteBench's longdialogue_qa_eng."""
    return float(answers[0] in re.sub(r"[\n:\"'.,?!{}]", " ", said).upper().split())


def choice(said: str, answers: Sequence[str]) -> float:
    """1 where what was said names the option (text, letter), by its first sign, after "answer is" or first of A to D.

    InfiniteBench's longbook_choice_eng.
    """
    said = said.strip()
    if not said:
        return 0.0
    if said[0] in "ABCD":
        return float(said[0] in answers)
    if said in answers:
        return 1.0
    said = re.sub(r"[\n\"'.,?!{} ]+", " ", said)
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = said.partition(phrase)
        if found:
            return float(rest[1:].startswith(tuple(answers)))
    letters = [word for word in said.split() if word in "ABCD"]
    return float(bool(letters) and letters[0] in answers)


def code_choice(said: str, answers: Sequence[str]) -> float:
    """1 where what was said names the option (function, letter), at its start or after "is:" or "answer:".

    InfiniteBench's code_debug.
    """
    function, letter = answers
    said = said.strip()
    if said[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    said = re.sub(r" +", " ", re.sub(r"[\n`'\"*-]|[Oo]ption", " ", said))
    for phrase in ("answer is:", "is:", "answer:"):
        _, found, rest = said.partition(phrase)
        if found:
            return float(rest[1:].startswith((letter, function)))
    return 0.0


def f1_words(said: str, answers: Sequence[str]) -> float:
    """The best F1 of common words, without case, punctuation and articles. InfiniteBench's longbook_qa_eng."""

    def words(text: str) -> list[str]:
        bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    return max(_f1(words(said), words(answer)) for answer in answers)


def f1_signs(said: str, answers: Sequence[str]) -> float:
    """The best F1 of common signs, without case, punctuation and space. InfiniteBench's longbook_qa_chn."""

    def signs(text: str) -> list[str]:
        return [sign for sign in text.lower() if not sign.isspace() and sign not in _PUNCTUATION]

    return max(_f1(signs(said), signs(answer)) for answer in answers)


_PUNCTUATION = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    + "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
"""That longbook_qa_chn leaves out, as published: an opening double angle bracket is not among it."""


def rouge_l_sum(said: str, answers: Sequence[str]) -> float:
    """The best ROUGE-Lsum F1 by the package rouge-score. InfiniteBench's longbook_sum_eng.

    Raises:
        ValueError: the package is not installed.
    """
    return float(rouge_scorer()(["rougeLsum"]).score_multi(answers, said)["rougeLsum"].fmeasure)


def rouge_scorer() -> Any:
    """The class that scores summaries.

    Raises:
        ValueError: the package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("longbook_sum_eng needs rouge-score: pip install 'minference-jax[evaluate]'") from None
    return RougeScorer


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


_ALL: tuple[Metric, ...] = (
    *(contains_all, contains_any, first_integer, is_word, first_number, leading_integers, last_integer, is_name),
    *(choice, code_choice, f1_words, f1_signs, rouge_l_sum),
)
METRICS: Mapping[str, Metric] = {metric.__name__: metric for metric in _ALL}  # type: ignore[attr-defined]

"""RULER's tasks that trace or count words: variable tracking, common words and frequent words."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from random import Random

from minference_jax.evaluate.ruler_needles import NOISE, word_list
from minference_jax.evaluate.samples import Question

HOPS = 4
_EXAMPLE_NOISES = 10  # lines: about 500 tokens with the rest
_CODE_LENGTH = 6  # letters of a coded word
_ZETA_2 = math.pi**2 / 6  # sum of 1 / rank^2

VT_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
VT_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are: "
)
CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"


def variable_tracking(random: Random, units: int) -> Question:
    """vt: five variables assigned one from the other in `units` lines of noise, after a solved example.

    As published, the example's template has its line ends made spaces, its text keeps them.
    """
    example = _chain(random, _EXAMPLE_NOISES, 3, " ".join(VT_TEMPLATE.split()))
    solved = example.messages[0] + example.answer_prefix + " " + " ".join(example.answers)
    question = _chain(random, units, 5, VT_TEMPLATE)
    return question._replace(messages=(f" {solved}\n\n\n\n{question.messages[0]}",))


def _chain(random: Random, noises: int, letters: int, template: str) -> Question:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(random.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = str(random.randint(10000, 99998))
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS))]
    sentences = [f"{NOISE}\n"] * noises
    for count, place in enumerate(sorted(random.sample(range(noises), len(lines)))):
        sentences.insert(place + count, lines[count])
    context = " ".join(sentences)
    answer = VT_ANSWER.format(count=len(names), query=value)
    return Question((template.format(context=context, query=value),), tuple(names), answer)


def common_word_list() -> tuple[str, ...]:
    """The words that cwe draws from.

    Raises:
        ValueError: wonderwords is not installed.
    """
    return word_list("noun", "adjective", "verb")


def common_words(words: Sequence[str], is_short: bool, random: Random, units: int) -> Question:
    """cwe: `units` different words, ten of them far more often than the rest, after a solved example.

    Args:
        words: to draw from.
        is_short: whether repetitions are those of lengths below 4096 tokens: 6 and 1, else 30 and 3.
        random: what draws.
        units: different words, at least eleven.
    """
    example, found = _word_list(random, words, *((20, 3, 1) if is_short else (40, 10, 3)))
    context, common = _word_list(random, words, units, *((6, 1) if is_short else (30, 3)))
    solved = CWE_ANSWER + " ".join(f"{i}. {word}" for i, word in enumerate(found, 1))
    asked = CWE_TEMPLATE.format(context=example), solved, CWE_TEMPLATE.format(context=context)
    return Question(asked, tuple(common), CWE_ANSWER)


def _word_list(random: Random, words: Sequence[str], count: int, often: int, seldom: int) -> tuple[str, list[str]]:
    chosen = random.sample(words, count)
    common, others = chosen[:10], chosen[10:]
    listed = common * often + others * seldom
    random.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def frequent_words(vocabulary: int, random: Random, units: int) -> Question:
    """fwe: about `units` coded words, the k-th as often as 1/k^2; the first is noise, the next three are asked for."""
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(random.choices(string.ascii_lowercase, k=_CODE_LENGTH))] = None
    ranked = ["...", *list(coded)[1:]]
    text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(units / rank**2 / _ZETA_2))]
    random.shuffle(text)
    return Question((FWE_TEMPLATE.format(context=" ".join(text)),), tuple(ranked[1:4]), FWE_ANSWER)

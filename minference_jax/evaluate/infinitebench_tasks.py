"""Contexts and questions of InfiniteBench's synthetic tasks, of as many units as asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from random import Random
from statistics import median
from typing import Any, NamedTuple

from minference_jax.evaluate.ruler_needles import NOISE


class Context(NamedTuple):
    """A text, and what asks about it: a generator -> the fields `input` and `answer`, a list."""

    text: str
    ask: Callable[[Random], Mapping[str, Any]]


class Synthetic(NamedTuple):
    """How a task's contexts are made: (generator, units) -> Context; the fewest units; whether more can be asked."""

    make: Callable[[Random, int], Context]
    least: int = 1
    has_many_questions: bool = False


def _in_noise(random: Random, units: int, line: str) -> str:
    lines = [f"{NOISE}\n"] * units
    lines.insert(random.randint(0, units), line)
    return "".join(lines)


def passkey(random: Random, units: int) -> Context:
    """Five digits in lines of noise."""
    key = "".join(random.choices("0123456789", k=5))
    text = _in_noise(random, units, f"The pass key is {key}. Remember it. {key} is the pass key.\n")
    return Context(text, lambda _: {"input": "What is the pass key?", "answer": [key]})


def number_string(random: Random, units: int) -> Context:
    """Ten digits, five of them repeats of the one before, in lines of noise."""
    digits = random.choices("0123456789", k=5)
    for _ in range(5):
        place = random.randrange(len(digits))
        digits.insert(place, digits[place])
    key = "".join(digits)
    line = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
    return Context(
        _in_noise(random, units, line), lambda _: {"input": "What is the sequence of digits?", "answer": [key]}
    )


def kv_retrieval(random: Random, units: int) -> Context:
    """A JSON object of random keys and values."""
    pairs = [tuple(str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in "kv") for _ in range(units)]
    data = ", ".join(f'"{key}": "{value}"' for key, value in pairs)

    def ask(draw: Random) -> Mapping[str, Any]:
        key, value = draw.choice(pairs)
        return {"input": f'Key: "{key}"\nThe value associated with the specified key is: ', "answer": [value]}

    return Context(f"JSON data:\n{{{data}}}", ask)


def math_find(random: Random, units: int) -> Context:
    """A list of numbers below 100, whose ends differ from list to list; an odd count, so that its median is in it."""
    low, high = random.randint(0, 40), random.randint(60, 99)
    numbers = [random.randint(low, high) for _ in range(2 * units + 1)]
    ranked = sorted(set(numbers))
    wanted = {f"{nth}{end} number": ranked[place] for end, places in _ENDS.items() for nth, place in places.items()}
    wanted["median"] = int(median(numbers))

    def ask(draw: Random) -> Mapping[str, Any]:
        name = draw.choice(list(wanted))
        question = f"You should answer with only one number, no other words. The {name} of the list is: "
        return {"input": question, "answer": [wanted[name]]}

    return Context(str(numbers), ask)


_ENDS = {
    "largest": {"": -1, "second ": -2, "third ": -3},
    "smallest": {"": 0, "second ": 1, "third ": 2},
}


def math_calc(random: Random, units: int) -> Context:
    """A sum of numbers below 100 with plus and minus, none of whose intermediate values is negative."""
    values = [random.randint(1, 99)]
    parts = [str(values[0])]
    for _ in range(units):
        number = random.randint(1, 99)
        sign = "+" if number > values[-1] else random.choice("+-")
        values.append(values[-1] + number if sign == "+" else values[-1] - number)
        parts += [sign, str(number)]
    return Context(" ".join(parts), lambda _: {"input": "", "answer": values})


def code_run(random: Random, units: int) -> Context:
    """Functions of which one calls the next, two to ten deep, among others that are not called."""
    depth = random.randint(2, min(10, units))
    names = random.sample(range(10 * units), units)
    shifts = [random.randint(-20, 20) for _ in names]
    texts = []
    for i, (name, shift) in enumerate(zip(names, shifts, strict=True)):
        called = f"func_{names[i + 1]}(x)" if i + 1 < depth else "x"
        texts.append(f"def func_{name}(x):\n    return {called} {'-' if shift < 0 else '+'} {abs(shift)}\n")
    random.shuffle(texts)

    def ask(draw: Random) -> Mapping[str, Any]:
        x = draw.randint(-10, 10)
        asked = f"Please give me the exact number of the return value of func_{names[0]}({x})."
        return {"input": asked, "answer": [x + sum(shifts[:depth])]}

    return Context("\n".join(texts), ask)


SYNTHETIC: Mapping[str, Synthetic] = {
    "passkey": Synthetic(passkey),
    "number_string": Synthetic(number_string),
    "kv_retrieval": Synthetic(kv_retrieval, 4, has_many_questions=True),
    "math_find": Synthetic(math_find, 100),
    "math_calc": Synthetic(math_calc),
    "code_run": Synthetic(code_run, 2),
}
"""The tasks that need no data."""

"""What argparse makes of one word of the command line. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import math

from minference_jax.patterns import AShape, BlockSparse, HeadPattern, VerticalSlash

HEAD_PATTERNS: dict[str, type[HeadPattern]] = {
    "a_shape": AShape,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
}


def positive(text: str) -> int:
    """An integer of at least 1.

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return number


def not_negative(text: str) -> int:
    """An integer of at least 0.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def port(text: str) -> int:
    """An integer from 1 to 65535.

    Raises:
        ArgumentTypeError: anything else.
    """
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} must be a port: an integer from 1 to 65535")
    return int(text)


def four_sizes(text: str) -> tuple[int, ...]:
    """Four integers of at least 1 with commas between them.

    Raises:
        ArgumentTypeError: anything else.
    """
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be four integers with commas between them")
    return tuple(map(positive, parts))


def share(text: str) -> float:
    """A number above 0 and below 1.

    Raises:
        ArgumentTypeError: anything else.
    """
    return _number(text, 1.0, "a number above 0 and below 1")


def factor(text: str) -> float:
    """A number above 0.

    Raises:
        ArgumentTypeError: anything else.
    """
    return _number(text, math.inf, "a number above 0")


def _number(text: str, end: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < end:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return number


def head_pattern(text: str) -> HeadPattern:
    """A kind with its sizes, such as vertical_slash:500,1500.

    Raises:
        ArgumentTypeError: anything else.
    """
    kind, colon, sizes = text.partition(":")
    if kind not in HEAD_PATTERNS:
        raise argparse.ArgumentTypeError(f"{text!r} must begin with one of {', '.join(HEAD_PATTERNS)} and a colon")
    names = list(HEAD_PATTERNS[kind].__dataclass_fields__)
    numbers = sizes.split(",")
    if not colon or len(numbers) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} needs its sizes: {kind}:{','.join(names).upper()}")
    return HEAD_PATTERNS[kind](**dict(zip(names, map(positive, numbers), strict=True)))


def layer_and_head(text: str) -> tuple[int, ...]:
    """One index or two with a comma between them.

    Raises:
        ArgumentTypeError: anything else.
    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be LAYER or LAYER,HEAD, counted from 0")
    return tuple(map(int, parts))

"""How many units of a text fill a prompt."""

from __future__ import annotations

import bisect
from collections.abc import Callable


def most_that_fit(
    tokens: Callable[[int], int],
    length: int,
    *,
    least: int = 1,
    most: int | None = None,
    what: str,
    shortest: str = "prompt and its answer take",
) -> int:
    """The largest number of units whose prompt, and answer where there is one, have no more than `length` tokens.

    Args:
        tokens: how many tokens a number of units makes, more for more.
        length: tokens.
        least: units that there must be.
        most: units that there are; None = any number.
        what: is to be filled, for messages.
        shortest: what it is that takes tokens, for messages.

    Raises:
        ValueError: `least` are too many, or all there are fill less than `length`.
    """
    if tokens(least) > length:
        raise ValueError(f"{what}: {length=} is too short, the shortest {shortest} {tokens(least)}")
    fits = high = least
    while high == fits:
        if high == most:
            raise ValueError(f"{what}: {length=} needs more material than there is, all of it makes {tokens(high)}")
        high = min(2 * fits, most) if most is not None else 2 * fits
        fits = high if tokens(high) <= length else fits
    return fits + bisect.bisect_right(range(fits + 1, high), length, key=tokens)

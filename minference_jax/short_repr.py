"""What was given, as error sentences show it."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 100  # characters


def short_repr(value: Any) -> str:
    """`repr` of a value, cut where it is long: parts of it, and then their end."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

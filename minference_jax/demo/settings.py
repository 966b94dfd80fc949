"""What the operator chooses when the demo starts, and what a visitor may then ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_UPLOAD_BYTES = 8_000_000
MAX_PAGES = 500
MAX_CHARACTERS_PER_TOKEN = 24
"""A text with more characters than this for each token that may be read is refused without being tokenized."""


class Refused(Exception):
    """What a visitor asked for is not done; the message is one sentence for the page."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a demo runs.

    Attributes:
        max_prompt_tokens: most tokens of text, question and chat template together.
        max_new_tokens: of each answer.
        repeats: timed prefills of each attention, after one that compiles and warms.
        max_queue: jobs that may wait while one runs.
        implementation: of the attentions; None = the first that can.

    Raises:
        ValueError: a number below 1, or below 0 for `max_queue`.
    """

    max_prompt_tokens: int
    max_new_tokens: int = 48
    repeats: int = 1
    max_queue: int = 8
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_tokens", 1), ("max_new_tokens", 1), ("repeats", 1), ("max_queue", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def max_characters(self) -> int:
        """Most characters of a text."""
        return self.max_prompt_tokens * MAX_CHARACTERS_PER_TOKEN

    def check_text(self, text: str, question: str) -> None:
        """Raises Refused where text or question are empty, or so long that tokenizing them is a waste."""
        if not text.strip():
            raise Refused("There is no text: paste one, upload a file, or take the example.")
        if not question.strip():
            raise Refused("There is no question: ask something about the text.")
        try:
            f"{text}{question}".encode()
        except UnicodeEncodeError:
            raise Refused("The text or the question holds half of a character: paste it again.") from None
        size = len(text) + len(question)
        if size > self.max_characters:
            raise Refused(
                f"Text and question have {size:,} characters, and this demo takes at most {self.max_characters:,}, "
                f"since it reads at most {self.max_prompt_tokens:,} tokens."
            )

    def check_tokens(self, count: int) -> None:
        """Raises Refused where a prompt has too many tokens."""
        if count > self.max_prompt_tokens:
            percent = math.ceil(100 * (1 - self.max_prompt_tokens / count))
            raise Refused(
                f"The text with its question has {count:,} tokens, and this demo reads at most "
                f"{self.max_prompt_tokens:,}: shorten the text by about {percent}%."
            )

"""Text out of tokens that arrive one by one, never half a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_INCOMPLETE = "\ufffd"  # what tokenizers put where bytes do not make a character (yet)


class TextPieces:
    """Turns tokens into text as they come. A character that several tokens spell waits for the last of them.

    Only the newest tokens are decoded again, together with those of the piece before, because tokenizers treat the
    first token of a text differently.

    Args:
        tokenizer: of transformers; special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens of the piece before and of the pending one
        self._pending_from = 0  # where in the window the pending tokens start
        self._given = 0  # characters of the window's text that are out already

    def push(self, token: int) -> str:
        """The text that `token` completes; empty where a character is still incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = len(text.rstrip(_INCOMPLETE))
        piece = text[self._given : complete]
        if complete == len(text):
            self._window = self._window[self._pending_from :]
            self._pending_from, self._given = len(self._window), len(self._decode(self._window))
        else:
            self._given = max(self._given, complete)
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come: bytes that never made a character, as U+FFFD."""
        piece = self._decode(self._window)[self._given :]
        self._window, self._pending_from, self._given = [], 0, 0
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode_text(self._tokenizer, tokens)


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens as they are spelled, without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_pieces(pieces: TextPieces, tokens: Iterator[np.ndarray], stops: frozenset[int]) -> Iterator[str]:
    """The text of one row's tokens int32 [1] as they come, up to a stop token."""
    for (token,) in tokens:
        if int(token) in stops:
            break
        if piece := pieces.push(int(token)):
            yield piece
    if rest := pieces.finish():
        yield rest

"""Prompts as arrays: checked, and padded to one of few lengths, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from minference_jax.models import DecoderConfig

Tokens: TypeAlias = Sequence[int] | np.ndarray

_MIN_BUCKET = 128  # tokens


def bucket_length(length: int) -> int:
    """The least bucket that holds `length` tokens: powers of two from 128 on with four even steps between two of them.

    At most a fifth of a bucket is padding (128 excepted), and a compiled program serves every length of its bucket.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"{length=} must be at least 1")
    power = _MIN_BUCKET
    while 2 * power < length:
        power *= 2
    step = power // 4
    return max(_MIN_BUCKET, -(-length // step) * step)


def pad_prompts(
    prompts: Tokens | Sequence[Tokens], *, vocab_size: int, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [B, T], padded at the end with 0 to a bucket T, and true lengths int32 [B].

    Args:
        prompts: token ids of one prompt, or of several, which may be of unequal lengths.
        vocab_size: ids must be below.
        max_length: tokens that the model can read.

    Raises:
        ValueError: no prompt, an empty one, one that is too long, or ids that are not tokens of the model.
    """
    if len(prompts) == 0:
        raise ValueError("a prompt must have at least one token, got none")
    several = not np.isscalar(prompts[0])
    rows = [np.asarray(row) for row in (prompts if several else [prompts])]
    for index, row in enumerate(rows):
        where = f"prompt {index}" if several else "the prompt"
        if row.ndim != 1 or row.size == 0:
            raise ValueError(f"{where} must be a list of at least one token id, got shape {list(row.shape)}")
        if not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"{where} must be integer token ids, got {row.dtype}")
        if row.size > max_length:
            raise ValueError(f"{where} has {row.size} tokens, the model can read {max_length}")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"{where} has token ids from {row.min()} to {row.max()}, they must lie from 0 to {vocab_size - 1}"
            )
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket_length(int(lengths.max()))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: ids.size] = ids
    return tokens, lengths


def check_room(config: DecoderConfig, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Whether prompts and their answers have room.

    Args:
        config: of the model.
        lengths: tokens of each prompt.
        max_new_tokens: most tokens of an answer.

    Raises:
        ValueError: there are fewer positions, or a row would grow past the length at which longrope changes.
    """
    length, most = max(lengths), config.max_length
    if length + max_new_tokens > most:
        needed = length + max_new_tokens
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens=} need {needed} positions, the model has {most}"
        )
    limit = _longrope_limit(config)
    if limit is None:
        return
    crossing = [length for length in lengths if length <= limit < length + max_new_tokens - 1]
    if crossing:
        length = max(crossing)
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens=} grow past {limit} tokens, where this model's "
            f"longrope changes for all of them: ask for at most {limit + 1 - length} tokens, then give prompt and "
            f"answer as a new prompt"
        )


def check_more(config: DecoderConfig, length: int, count: int) -> None:
    """Whether a row of `length` tokens has room for `count` more, all of which are read.

    Raises:
        ValueError: there are fewer positions, or the row would grow past the length at which longrope changes.
    """
    if length + count > config.max_length:
        raise ValueError(
            f"{count} tokens after {length} need {length + count} positions, the model has {config.max_length}"
        )
    limit = _longrope_limit(config)
    if limit is not None and length <= limit < length + count:
        raise ValueError(
            f"{count} tokens after {length} grow past {limit}, where this model's longrope changes for all of them: "
            f"give all of them as a new prompt"
        )


def _longrope_limit(config: DecoderConfig) -> int | None:
    """Tokens of a row beyond which longrope turns all of them by other factors; None = the model has no longrope."""
    rope = config.rope
    return rope.given("original_max_position_embeddings") if rope.rope_type == "longrope" else None


def stop_token_ids(stop_tokens: Sequence[int]) -> frozenset[int]:
    """The ids as a set; ValueError where one is no integer."""
    wrong = [token for token in stop_tokens if not isinstance(token, int | np.integer)]
    if wrong:
        raise ValueError(f"stop_tokens must be token ids, got {wrong[0]!r}")
    return frozenset(int(token) for token in stop_tokens)

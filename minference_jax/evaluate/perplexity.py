"""Perplexity by position: how well a text is predicted early and late in a long prompt, dense against sparse."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minference_jax.evaluate.contenders import Contender, describe, resolve, with_dense
from minference_jax.evaluate.journal import PERPLEXITY as TASK
from minference_jax.evaluate.journal import Journal
from minference_jax.evaluate.run import OnRecord, run_settings
from minference_jax.evaluate.samples import check_counts, check_lengths
from minference_jax.generate import LanguageModel


def evaluate_perplexity(
    model: LanguageModel,
    text: str,
    lengths: Sequence[int],
    contenders: Sequence[Contender],
    *,
    excerpts: int = 1,
    steps: int = 8,
    output: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_record: OnRecord | None = None,
) -> list[dict[str, Any]]:
    """Negative log-likelihoods of a text's tokens by position, with dense attention and with each contender.

    An excerpt is read whole in one prefill, so the choice of what to keep sees its last queries as in any prompt.
    Logits are made in chunks: memory is that of a prefill.

    Args:
        model: that reads, with a tokenizer.
        text: prose, at least as long as the excerpts of the longest length together.
        lengths: tokens of an excerpt, the tokenizer's own first tokens included.
        contenders: beside dense attention, which always reads first.
        excerpts: for each length, one after the other from the text's beginning.
        steps: ranges of positions of equal size that likelihoods are summed over.
        output, settings, on_record: as in `evaluate_answers`.

    Returns:
        Records: task, length, index (of the excerpt), attention, pattern, density, prompt; and for each range of
        positions its `ends`, `counts` of tokens, sums of negative log-likelihoods in nats `nll`, of their squares
        `nll_squares`, and of what they are above dense attention's, `above` and `above_squares` (null for dense).

    Raises:
        ValueError: counts below 1, a length below `steps` + 1 or beyond the model's, a text that is too short,
            contenders that do not go together, a file of another run.
        NotImplementedError, MemoryError: as `LanguageModel.prefill`.
        OSError: the file can't be read or written.
    """
    check_counts(excerpts=excerpts, steps=steps)
    check_lengths(model, lengths)
    if min(lengths) <= steps:
        raise ValueError(f"an excerpt of {min(lengths)} tokens has no room for {steps=} ranges of positions")
    ordered = with_dense(contenders)
    cut = [(length, list(_excerpts(model, text, length, excerpts))) for length in lengths]
    journal = Journal(output, run_settings(model, ordered, settings, steps=steps))
    for length, several in cut:
        for index, tokens in enumerate(several):
            for record in _score(model, (length, index), tokens, ordered, steps, journal):
                if on_record is not None:
                    on_record(record)
    return journal.records


def _excerpts(model: LanguageModel, text: str, length: int, count: int) -> Iterator[list[int]]:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it can't read text")
    start = model.encode("")
    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    size = length - len(start)
    if len(tokens) < count * size:
        raise ValueError(f"the text has {len(tokens)} tokens, {count} excerpts of {length} need {count * size}")
    for index in range(count):
        yield [*start, *tokens[index * size : (index + 1) * size]]


def _score(
    model: LanguageModel,
    where: tuple[int, int],
    tokens: list[int],
    ordered: Sequence[Contender],
    steps: int,
    journal: Journal,
) -> Iterator[dict[str, Any]]:
    """Records of one excerpt; dense attention reads it again where only others are missing."""
    digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]
    found = {one.name: journal.find(TASK, *where, one.name) for one in ordered}
    if any(record is not None and record["prompt"] != digest for record in found.values()):
        raise ValueError(f"the file holds another text for excerpt {where[1]} of {where[0]} tokens: give another file")
    densities: dict[str, float] = {}
    dense: np.ndarray | None = None
    is_complete = all(record is not None for record in found.values())
    for contender in ordered:
        record = found[contender.name]
        if record is None or (contender.name == "dense" and not is_complete):
            options = resolve(contender, model, len(tokens), densities)
            scores = model.score(tokens, **options)
            dense = -scores.log_probs.astype(np.float64) if contender.name == "dense" else dense
            pattern = options["pattern"]
            if contender.attention == "minference" and pattern is None:
                pattern = model.patterns
            record = {
                **dict(zip(("task", "length", "index"), (TASK, *where), strict=True)),
                "attention": contender.name,
                "pattern": describe(pattern),
                "density": 1.0 if scores.density is None else float(np.mean(scores.density)),
                "prompt": digest,
                **_sums(-scores.log_probs.astype(np.float64), None if contender.name == "dense" else dense, steps),
            }
            if found[contender.name] is None:
                found[contender.name] = journal.append(record)
        densities[contender.name] = record["density"]
        yield found[contender.name] or record


def _sums(nll: np.ndarray, dense: np.ndarray | None, steps: int) -> dict[str, Any]:
    """Sums over ranges of positions; nll[t] is that of token t + 1."""
    edges = [len(nll) * step // steps for step in range(steps + 1)]

    def by_range(values: np.ndarray) -> list[float]:
        return [float(values[low:high].sum()) for low, high in itertools.pairwise(edges)]

    above = None if dense is None else nll - dense
    return {
        "ends": edges[1:],
        "counts": [high - low for low, high in itertools.pairwise(edges)],
        "nll": by_range(nll),
        "nll_squares": by_range(nll**2),
        "above": None if above is None else by_range(above),
        "above_squares": None if above is None else by_range(above**2),
    }

"""Dense against another attention on one prompt: times, density, and whether the answers agree. Prints nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.generate.streaming import decode_text
from minference_jax.measure.attentions import DENSE, ChosenAttention
from minference_jax.measure.device import peak_memory
from minference_jax.measure.timing import PrefillTimer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one attention gave.

    Attributes:
        implementation: that ran.
        compile_seconds: from the first call to the end of its last compilation; None where nothing was compiled.
        seconds: of each timed prefill, from the call to the last array on the device.
        result: of the last of them.
        tokens: greedy ones, up to and with the stop token; longer where the comparison needs more.
        text: up to the stop token.
    """

    implementation: str
    compile_seconds: float | None
    seconds: tuple[float, ...]
    result: PrefillResult
    tokens: tuple[int, ...]
    text: str

    @property
    def median_seconds(self) -> float:
        """Of the timed prefills."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Dense and the chosen attention, side by side.

    Attributes:
        dense, sparse: what each gave.
        compared: how many greedy tokens are compared: dense attention's answer with its stop token.
        agreed: how many of them are equal, place by place.
        max_logit_difference: largest absolute difference of the logits after the prompt.
        density: float32 [L, N], each head's share of dense attention's work; None where the chosen one is dense.
        peak_bytes: most memory held so far, by the device where it says so, else by this process; None = unknown.
        peak_of: "device" or "process".
    """

    dense: Answer
    sparse: Answer
    compared: int
    agreed: int
    max_logit_difference: float
    density: np.ndarray | None
    peak_bytes: int | None
    peak_of: str

    @property
    def speedup(self) -> float:
        """Median dense seconds by median sparse seconds."""
        return self.dense.median_seconds / self.sparse.median_seconds


def compare(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    attention: ChosenAttention,
    implementation: str | None,
    max_new_tokens: int,
    repeats: int,
    step: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Comparison:
    """Prefills one prompt with dense and with another attention, in turn, and decodes greedily from both.

    Both are compiled and run once before anything is timed; then dense and the other take turns, so that a machine
    that grows slower or faster changes both.

    Args:
        model: reads and answers.
        tokens: of the prompt.
        attention: the other.
        implementation: of both; None = for each the first that can.
        max_new_tokens: most greedy tokens to make.
        repeats: timed runs of each.
        step: entered with the name of each step, around it; there are `steps_of(repeats)`.

    Raises:
        ValueError, NotImplementedError: as in `LanguageModel.prefill`.
    """
    dense, sparse = PrefillTimer(model, tokens, DENSE), PrefillTimer(model, tokens, attention)
    timers = {"dense": dense, attention.name if attention.name != "dense" else "dense again": sparse}
    for name, timer in timers.items():
        with step(f"compile {name}"):
            timer.compile(implementation)
    for number in range(repeats):
        for name, timer in timers.items():
            with step(f"prefill {name}, run {number + 1} of {repeats}"):
                timer.run()
    with step("decode dense"):
        dense_tokens = greedy_tokens(model, dense.result, max_new_tokens, at_least=1)
    with step(f"decode {attention.name}"):
        sparse_tokens = greedy_tokens(model, sparse.result, max_new_tokens, at_least=len(dense_tokens))
    return side_by_side(model, (dense, dense_tokens), (sparse, sparse_tokens))


def steps_of(repeats: int) -> int:
    """How many steps `compare` has: two attentions are compiled, run `repeats` times, and decoded from."""
    return 2 * (repeats + 2)


def side_by_side(
    model: LanguageModel, dense: tuple[PrefillTimer, Sequence[int]], sparse: tuple[PrefillTimer, Sequence[int]]
) -> Comparison:
    """What two timers found, put together.

    Args:
        model: of both.
        dense, sparse: each a timer that has run, and the greedy tokens that follow its result; those of sparse at least
            as many as those of dense.
    """
    answers = [
        Answer(
            implementation=timer.implementation,
            compile_seconds=timer.compile_seconds,
            seconds=tuple(timer.seconds),
            result=timer.result,
            tokens=tuple(tokens),
            text=_text(model, tokens),
        )
        for timer, tokens in (dense, sparse)
    ]
    ours, theirs = (answer.tokens for answer in answers)
    logits = [np.asarray(answer.result.logits[0]) for answer in answers]
    density = answers[1].result.density
    peak_bytes, peak_of = peak_memory()
    return Comparison(
        dense=answers[0],
        sparse=answers[1],
        compared=len(ours),
        agreed=sum(a == b for a, b in zip(ours, theirs, strict=False)),
        max_logit_difference=float(np.abs(logits[0] - logits[1]).max()),
        density=None if density is None else np.asarray(density)[:, 0],
        peak_bytes=peak_bytes,
        peak_of=peak_of,
    )


def greedy_tokens(model: LanguageModel, prefilled: PrefillResult, max_new_tokens: int, *, at_least: int) -> list[int]:
    """Greedy tokens up to and with the first stop token, going on behind it where fewer than at_least are there."""
    tokens: list[int] = []
    stopped = False
    for (token,) in model.decode(prefilled, max_new_tokens=max_new_tokens):
        tokens.append(int(token))
        stopped = stopped or tokens[-1] in model.stop_tokens
        if stopped and len(tokens) >= at_least:
            break
    return tokens


def _text(model: LanguageModel, tokens: Sequence[int]) -> str:
    end = next((place for place, token in enumerate(tokens) if token in model.stop_tokens), len(tokens))
    return decode_text(model.tokenizer, tokens[:end])

"""Dense against another attention on one prompt: times, density, and whether the answers agree. Prints nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from minference_jax.cache import AnyPolicy
from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.generate.streaming import decode_text
from minference_jax.measure.attentions import DENSE, ChosenAttention
from minference_jax.measure.device import peak_memory
from minference_jax.measure.timing import PrefillTimer

Side = Literal["dense", "sparse"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one attention gave.

    Attributes:
        implementation: that ran.
        compile_seconds: from the first call to the end of its last compilation; None where nothing was compiled.
        seconds: of each timed prefill, from the call to the last array on the device.
        tokens: greedy ones, up to and with the stop token; longer where the comparison needs more.
        text: up to the stop token.
    """

    implementation: str
    compile_seconds: float | None
    seconds: tuple[float, ...]
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


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of `compare`.

    Attributes:
        kind: "compile", where the first call compiles and warms; "prefill", a timed one; "decode", the answer.
        side: whose.
        timer: of that side.
        run: of the timed prefills, from 1; 0 in other steps.
    """

    kind: Literal["compile", "prefill", "decode"]
    side: Side
    timer: PrefillTimer
    run: int = 0


def compare(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    attention: ChosenAttention,
    implementation: str | None,
    max_new_tokens: int,
    repeats: int,
    chunk_size: int | None = None,
    kv_cache: str | AnyPolicy = "plain",
    step: Callable[[Step], AbstractContextManager[object]] = nullcontext,
    on_token: Callable[[Side, int], None] | None = None,
) -> Comparison:
    """Prefills one prompt with dense and with another attention, in turn, and decodes greedily from both.

    Both are compiled and run once before anything is timed; then dense and the other take turns, so that a machine
    that grows slower or faster changes both. Then both answer, one after the other. No array stays on the device.

    Args:
        model: reads and answers.
        tokens: of the prompt.
        attention: the other.
        implementation: of both; None = for each the first that can.
        max_new_tokens: most greedy tokens to make.
        repeats: timed runs of each.
        chunk_size: of both, as in `LanguageModel.prefill`; None = all tokens at once.
        kv_cache: of the other, as in `LanguageModel.prefill`; dense attention is compared with the plain one.
        step: entered with each step, around it; there are `steps_of(repeats)`. What it raises ends the comparison.
        on_token: is called with the side and each token of its answer; what it raises ends the comparison.

    Raises:
        ValueError, NotImplementedError, MemoryError: as in `LanguageModel.prefill` and `decode`.
    """
    chosen: dict[Side, ChosenAttention] = {"dense": DENSE, "sparse": attention}
    caches: dict[Side, str | AnyPolicy] = {"dense": "plain", "sparse": kv_cache}
    timers = {
        side: PrefillTimer(model, tokens, one, chunk_size=chunk_size, kv_cache=caches[side])
        for side, one in chosen.items()
    }
    for side, timer in timers.items():
        with step(Step(kind="compile", side=side, timer=timer)):
            timer.compile(implementation)
    for number in range(repeats):
        for side, timer in timers.items():
            with step(Step(kind="prefill", side=side, timer=timer, run=number + 1)):
                timer.run()
    logits = [np.asarray(timer.result.logits[0]) for timer in timers.values()]
    density = timers["sparse"].result.density
    kept = None if density is None else np.asarray(density)[:, 0]
    made: dict[Side, list[int]] = {}
    for side, timer in timers.items():
        with step(Step(kind="decode", side=side, timer=timer)):
            made[side] = greedy_tokens(
                model,
                timer.take(),
                max_new_tokens,
                at_least=len(made.get("dense", [0])),
                on_token=None if on_token is None else partial(on_token, side),
            )
    peak_bytes, peak_of = peak_memory()
    return Comparison(
        dense=_answer(model, timers["dense"], made["dense"]),
        sparse=_answer(model, timers["sparse"], made["sparse"]),
        compared=len(made["dense"]),
        agreed=sum(a == b for a, b in zip(made["dense"], made["sparse"], strict=False)),
        max_logit_difference=float(np.abs(logits[0] - logits[1]).max()),
        density=kept,
        peak_bytes=peak_bytes,
        peak_of=peak_of,
    )


def steps_of(repeats: int) -> int:
    """How many steps `compare` has: two attentions are compiled, run `repeats` times, and decoded from."""
    return 2 * (repeats + 2)


def greedy_tokens(
    model: LanguageModel,
    prefilled: PrefillResult,
    max_new_tokens: int,
    *,
    at_least: int,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Greedy tokens up to and with the first stop token, going on behind it where fewer than at_least are there.

    Args:
        model: that read.
        prefilled: what to go on from; a caller who does not keep it has its memory back at the second token.
        max_new_tokens: most tokens.
        at_least: tokens to make whatever comes, up to max_new_tokens.
        on_token: is called with each token when it is there.
    """
    stream = model.decode(prefilled, max_new_tokens=max_new_tokens)
    del prefilled
    tokens: list[int] = []
    stopped = False
    for (token,) in stream:
        tokens.append(int(token))
        if on_token is not None:
            on_token(tokens[-1])
        stopped = stopped or tokens[-1] in model.stop_tokens
        if stopped and len(tokens) >= at_least:
            break
    return tokens


def _answer(model: LanguageModel, timer: PrefillTimer, tokens: Sequence[int]) -> Answer:
    return Answer(
        implementation=timer.implementation,
        compile_seconds=timer.compile_seconds,
        seconds=tuple(timer.seconds),
        tokens=tuple(tokens),
        text=_text(model, tokens),
    )


def _text(model: LanguageModel, tokens: Sequence[int]) -> str:
    end = next((place for place, token in enumerate(tokens) if token in model.stop_tokens), len(tokens))
    return decode_text(model.tokenizer, tokens[:end])

"""Dense against another attention on one prompt: times, density, and whether the answers agree. Prints nothing."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np

from minference_jax.cli.inputs import ChosenAttention
from minference_jax.cli.progress import Steps
from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.generate.streaming import decode_text
from minference_jax.implementations import IMPLEMENTATIONS

_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax reports it when a program is compiled


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


class _Runner:
    """One attention on one prompt, its calls timed."""

    result: PrefillResult  # of the last call

    def __init__(self, model: LanguageModel, tokens: Sequence[int], attention: ChosenAttention):
        self._model, self._tokens = model, tokens
        self._options = {"attention": attention.name, "pattern": attention.pattern}
        self._options |= {"slash_granularity": attention.slash_granularity}
        self.implementation = ""
        self.compile_seconds: float | None = None
        self.seconds: list[float] = []

    def compile(self, implementation: str | None) -> None:
        """The first call, which compiles and warms; finds out which implementation can do it where none is named."""
        names = [name for name, *_ in IMPLEMENTATIONS] if implementation is None else [implementation]
        reasons = []
        for self.implementation in names:
            start = time.perf_counter()
            try:
                with _compilations() as ends:
                    self.result = self._call()
            except NotImplementedError as error:
                reasons.append(f"{self.implementation}: {error}")
                continue
            self.compile_seconds = ends[-1] - start if ends else None
            return
        raise NotImplementedError("; ".join(reasons))

    def run(self) -> None:
        """One timed call."""
        del self.result  # its memory is free for this one
        start = time.perf_counter()
        self.result = self._call()
        self.seconds.append(time.perf_counter() - start)

    def _call(self) -> PrefillResult:
        implementation = self.implementation
        return jax.block_until_ready(
            self._model.prefill(self._tokens, implementation=implementation, **self._options)  # type: ignore[arg-type]
        )


@contextmanager
def _compilations() -> Iterator[list[float]]:
    """Notes when each compilation inside the block ends, by the clock of time.perf_counter."""
    ends: list[float] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            ends.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield ends
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def compare(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    attention: ChosenAttention,
    implementation: str | None,
    max_new_tokens: int,
    repeats: int,
    show_progress: bool,
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
        show_progress: whether to draw a bar on standard error.

    Raises:
        ValueError, NotImplementedError: as in `LanguageModel.prefill`.
    """
    dense = _Runner(model, tokens, ChosenAttention("dense", None, "dense"))
    sparse = _Runner(model, tokens, attention)
    runners = {"dense": dense, attention.name if attention.name != "dense" else "dense again": sparse}
    with Steps(2 * (repeats + 2), show_progress) as steps:
        for name, runner in runners.items():
            with steps.step(f"compile {name}"):
                runner.compile(implementation)
        for number in range(repeats):
            for name, runner in runners.items():
                with steps.step(f"prefill {name}, run {number + 1} of {repeats}"):
                    runner.run()
        with steps.step("decode dense"):
            dense_tokens = _greedy(model, dense.result, max_new_tokens, at_least=1)
        with steps.step(f"decode {attention.name}"):
            sparse_tokens = _greedy(model, sparse.result, max_new_tokens, at_least=len(dense_tokens))
    return _side_by_side(model, (dense, dense_tokens), (sparse, sparse_tokens))


def _side_by_side(model: LanguageModel, dense: Any, sparse: Any) -> Comparison:
    answers = [
        Answer(
            implementation=runner.implementation,
            compile_seconds=runner.compile_seconds,
            seconds=tuple(runner.seconds),
            result=runner.result,
            tokens=tuple(tokens),
            text=_text(model, tokens),
        )
        for runner, tokens in (dense, sparse)
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


def _greedy(model: LanguageModel, prefilled: PrefillResult, max_new_tokens: int, *, at_least: int) -> list[int]:
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


def peak_memory() -> tuple[int | None, str]:
    """The most memory held so far, in bytes, and whose: the device's where it says, else this process's."""
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "peak_bytes_in_use" in statistics_of_device:
        return int(statistics_of_device["peak_bytes_in_use"]), "device"
    if sys.platform == "win32":
        return None, "process"
    if sys.platform == "linux":  # not ru_maxrss: a new process starts with what the one that started it held
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024, "process"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"  # bytes on macOS

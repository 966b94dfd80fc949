"""Prefills of one prompt, timed, with compilation apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.monitoring

from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.implementations import IMPLEMENTATIONS
from minference_jax.measure.attentions import ChosenAttention

_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax reports it when a program is compiled


class PrefillTimer:
    """One attention on one prompt, its calls timed.

    Args:
        model: that reads.
        tokens: of the prompt.
        attention: how.

    Attributes:
        result: of the last call.
        implementation: that ran; empty before `compile`.
        compile_seconds: from the first call to the end of its last compilation; None where nothing was compiled.
        seconds: of each timed call.
    """

    result: PrefillResult

    def __init__(self, model: LanguageModel, tokens: Sequence[int], attention: ChosenAttention):
        self._model, self._tokens = model, tokens
        self._options = {"attention": attention.name, "pattern": attention.pattern}
        self._options |= {"slash_granularity": attention.slash_granularity}
        self.implementation = ""
        self.compile_seconds: float | None = None
        self.seconds: list[float] = []

    def compile(self, implementation: str | None) -> None:
        """The first call, which compiles and warms; finds out which implementation can do it where none is named.

        Raises:
            ValueError, NotImplementedError, MemoryError: as in `LanguageModel.prefill`.
        """
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

    def take(self) -> PrefillResult:
        """Hands over the result of the last call: the timer does not hold it any more."""
        result = self.result
        del self.result
        return result

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

"""Calls, such as prefills of one prompt, timed with compilation apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import numpy as np

from minference_jax.cache import AnyPolicy
from minference_jax.generate import LanguageModel, PrefillResult
from minference_jax.implementations import IMPLEMENTATIONS
from minference_jax.measure.attentions import ChosenAttention

_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax reports it when a program is compiled


class CallTimer:
    """Timed calls of one way to do a thing.

    Args:
        call: does it with the implementation of a name.

    Attributes:
        result: of the last call.
        implementation: that ran; empty before `compile`.
        compile_seconds: from the first call to the end of its last compilation; None where nothing was compiled.
        seconds: of each timed call.
    """

    result: Any

    def __init__(self, call: Callable[[str], Any]):
        self._do = call
        self.implementation = ""
        self.compile_seconds: float | None = None
        self.seconds: list[float] = []

    def compile(self, implementation: str | None) -> None:
        """The first call, which compiles and warms; finds out which implementation can do it where none is named.

        Raises:
            ValueError, NotImplementedError, MemoryError: as the call.
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
        self.__dict__.pop("result", None)  # its memory is free for this one
        start = time.perf_counter()
        self.result = self._call()
        self.seconds.append(time.perf_counter() - start)

    def run_untimed(self) -> None:
        """One more call whose time does not count."""
        self.__dict__.pop("result", None)
        self.result = self._call()

    def take(self) -> Any:
        """Hands over the result of the last call: the timer does not hold it any more."""
        result = self.result
        del self.result
        return result

    def _call(self) -> Any:
        return jax.block_until_ready(self._do(self.implementation))


class PrefillTimer(CallTimer):
    """One attention on one prompt, its calls timed.

    Args:
        model: that reads.
        tokens: of the prompt.
        attention: how.
        chunk_size, kv_cache: as in `LanguageModel.prefill`.
    """

    result: PrefillResult

    def __init__(
        self,
        model: LanguageModel,
        tokens: Sequence[int] | np.ndarray,
        attention: ChosenAttention,
        *,
        chunk_size: int | None = None,
        kv_cache: str | AnyPolicy = "plain",
    ):
        options: dict[str, Any] = {"attention": attention.name, "pattern": attention.pattern, "chunk_size": chunk_size}
        options |= {"slash_granularity": attention.slash_granularity, "kv_cache": kv_cache}
        super().__init__(lambda implementation: model.prefill(tokens, implementation=implementation, **options))


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

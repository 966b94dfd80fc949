"""What a job does on the device: the two prefills, timed in turn, then the two answers, told step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from minference_jax.demo.jobs import Job
from minference_jax.demo.settings import Settings
from minference_jax.generate import LanguageModel
from minference_jax.generate.streaming import TextPieces
from minference_jax.measure import ChosenAttention, Comparison, Prompt, Step, attention_of, compare
from minference_jax.measure.energy import LEAST_SECONDS

Joules = Callable[[], float | None]
_BLOCK = 64  # keys


@dataclass(frozen=True)
class Side:
    """One attention so far.

    Attributes:
        compile_seconds: of its first call; None where nothing was compiled, or not yet.
        seconds: of its timed prefills so far.
        joules: of the whole card over its timed prefills so far; None where it is not measured, as of short ones.
        answer: text so far.
    """

    compile_seconds: float | None = None
    seconds: tuple[float, ...] = ()
    joules: float | None = None
    answer: str = ""


@dataclass(frozen=True)
class RunState:
    """A run so far.

    Attributes:
        attention: the sparse one.
        tokens: of the prompt.
        pays_from: as `LanguageModel.pays_from` says of this attention.
        step: what happens now, in words.
        active: "dense" or "sparse" where the step is one's prefill, timed or not; else None.
        is_timed: whether the step is a timed prefill.
        began: when the step began, by time.monotonic.
        dense, sparse: the two.
        comparison: at the end.
    """

    attention: ChosenAttention
    tokens: int = 0
    pays_from: int | None = None
    step: str = ""
    active: str | None = None
    is_timed: bool = False
    began: float = field(default_factory=time.monotonic)
    dense: Side = Side()
    sparse: Side = Side()
    comparison: Comparison | None = None


def first_attention(model: LanguageModel, tokens: int, implementation: str | None) -> ChosenAttention:
    """An attention that shows something at a length: the model's own patterns where they pay, else smaller ones.

    Args:
        model: that reads.
        tokens: of the text that the page begins with.
        implementation: of the attentions; None = the first that can.

    Returns:
        "minference" where the rule of thumb says that it pays at this length; else vertical-slash heads that ask for an
        eighth of the keys, of whole block diagonals.

    Raises:
        ValueError, NotImplementedError: as in `LanguageModel.pays_from`.
    """
    pays = model.pays_from(implementation=implementation)
    if pays is not None and pays <= tokens:
        return attention_of("minference", slash_granularity=model.patterns.slash_granularity)
    size = max(1, round(tokens / 16 / _BLOCK)) * _BLOCK
    return attention_of("vertical_slash", {"vertical_size": size, "slash_size": size}, "block")


def run_comparison(
    job: Job, model: LanguageModel, prompt: Prompt, attention: ChosenAttention, settings: Settings, joules: Joules
) -> RunState:
    """Compares as `measure.compare` does; tells each step and each token of the answers through `job.state`.

    Args:
        job: of which this is the work.
        model: reads and answers.
        prompt: what it reads.
        attention: to compare with dense.
        settings: of the demo.
        joules: gives an energy counter; None = not measured.

    Raises:
        Cancelled: between two steps or tokens. A prefill that runs can't be stopped.
        ValueError, NotImplementedError, MemoryError: as in `measure.compare`.
    """
    model.check_room([len(prompt.tokens)], settings.max_new_tokens)
    pays = model.pays_from(attention.pattern, implementation=settings.implementation)
    telling = _Telling(job, model, RunState(attention, len(prompt.tokens), pays), settings.repeats, joules)
    found = compare(
        model,
        prompt.tokens,
        attention=attention,
        implementation=settings.implementation,
        max_new_tokens=settings.max_new_tokens,
        repeats=settings.repeats,
        step=telling.step,
        on_token=telling.token,
    )
    job.state = replace(job.state, step="", active=None, is_timed=False, comparison=found)
    return job.state


class _Telling:
    """What a comparison tells while it runs: each step and token, through the job's state."""

    def __init__(self, job: Job, model: LanguageModel, state: RunState, repeats: int, joules: Joules):
        self._job, self._model, self._repeats, self._joules = job, model, repeats, joules
        self._pieces = TextPieces(model.tokenizer)
        self._is_written = False
        job.state = state

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Around a step; raises Cancelled before it."""
        job, side = self._job, step.side
        job.check()
        name = "dense" if side == "dense" else job.state.attention.name
        words = {
            "compile": f"compiling {name} attention, and one prefill that is not timed",
            "prefill": f"prefill with {name} attention, run {step.run} of {self._repeats}",
            "decode": f"answering after {name} attention",
        }
        active = None if step.kind == "decode" else side
        is_timed = step.kind == "prefill"
        job.state = replace(job.state, step=words[step.kind], active=active, is_timed=is_timed, began=time.monotonic())
        self._pieces, self._is_written = TextPieces(self._model.tokenizer), False
        before = self._joules() if is_timed else None
        try:
            yield
        finally:
            job.state = replace(job.state, active=None, is_timed=False)
        if step.kind == "compile":
            self._tell(side, compile_seconds=step.timer.compile_seconds)
        elif is_timed:
            self._tell(side, seconds=tuple(step.timer.seconds), joules=self._total_joules(step, before))
        elif not self._is_written:
            self._tell(side, answer=getattr(job.state, side).answer + self._pieces.finish())

    def token(self, side: str, token: int) -> None:
        """A token of an answer, of which those behind a stop token are compared and not shown; raises Cancelled."""
        self._job.check()
        if self._is_written:
            return
        self._is_written = token in self._model.stop_tokens
        piece = self._pieces.finish() if self._is_written else self._pieces.push(token)
        self._tell(side, answer=getattr(self._job.state, side).answer + piece)

    def _total_joules(self, step: Step, before: float | None) -> float | None:
        after, so_far = self._joules(), getattr(self._job.state, step.side).joules
        if before is None or after is None or min(step.timer.seconds) < LEAST_SECONDS:
            return None
        return after - before + (so_far or 0.0)

    def _tell(self, side: str, **changes: object) -> None:
        self._job.state = replace(self._job.state, **{side: replace(getattr(self._job.state, side), **changes)})

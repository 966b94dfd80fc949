"""What a job does on the device: the two prefills, timed in turn, and the two answers, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from minference_jax.demo.jobs import Job
from minference_jax.demo.settings import Settings
from minference_jax.generate import LanguageModel
from minference_jax.generate.streaming import TextPieces
from minference_jax.measure import DENSE, ChosenAttention, Comparison, PrefillTimer, Prompt, side_by_side

Joules = Callable[[], float | None]
SIDES = ("dense", "sparse")


@dataclass(frozen=True)
class Side:
    """One attention so far.

    Attributes:
        compile_seconds: of its first call; None where nothing was compiled, or not yet.
        seconds: of its timed prefills so far.
        joules: of the whole card over its timed prefills so far; None where it is not measured.
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
        step: what happens now, in words.
        active: "dense" or "sparse" where the step is one's prefill, timed or not; else None.
        is_timed: whether the step is a timed prefill.
        began: when the step began, by time.monotonic.
        dense, sparse: the two.
        comparison: at the end; without what the prefills left on the device.
    """

    attention: ChosenAttention
    tokens: int = 0
    step: str = ""
    active: str | None = None
    is_timed: bool = False
    began: float = field(default_factory=time.monotonic)
    dense: Side = Side()
    sparse: Side = Side()
    comparison: Summary | None = None


@dataclass(frozen=True)
class Summary:
    """What is known at the end of a run.

    Attributes:
        dense_seconds, sparse_seconds: medians of the timed prefills.
        speedup: dense by sparse.
        density: share of dense attention's work that the heads compute, mean; None where dense attention ran.
        density_range: of the heads.
        implementations: of dense and sparse.
        agreed, compared: greedy tokens that are equal, place by place, of how many.
        max_logit_difference: after the prompt.
        peak_bytes, peak_of: most memory so far since the demo began, of the device or the process.
    """

    dense_seconds: float
    sparse_seconds: float
    speedup: float
    density: float | None
    density_range: tuple[float, float] | None
    implementations: tuple[str, str]
    agreed: int
    compared: int
    max_logit_difference: float
    peak_bytes: int | None
    peak_of: str


def run_comparison(
    job: Job, model: LanguageModel, prompt: Prompt, attention: ChosenAttention, settings: Settings, joules: Joules
) -> RunState:
    """Compiles both, times both in turn, decodes from both in turn; tells each step through `job.state`.

    Args:
        job: of which this is the work.
        model: reads and answers.
        prompt: what it reads.
        attention: to compare with dense.
        settings: of the demo.
        joules: gives an energy counter; None = not measured.

    Raises:
        Cancelled: between two steps or tokens. A prefill that runs can't be stopped.
        ValueError, NotImplementedError, MemoryError: as in `LanguageModel.prefill`.
    """
    model.check_room([len(prompt.tokens)], settings.max_new_tokens)
    timers = {
        "dense": PrefillTimer(model, prompt.tokens, DENSE),
        "sparse": PrefillTimer(model, prompt.tokens, attention),
    }
    job.state = RunState(attention, len(prompt.tokens))
    names = {"dense": "dense attention", "sparse": f"{attention.name} attention"}
    for side, timer in timers.items():
        with _step(job, f"compiling {names[side]}, and one prefill that is not timed", side):
            timer.compile(settings.implementation)
        _tell(job, side, compile_seconds=timer.compile_seconds)
    for number in range(settings.repeats):
        for side, timer in timers.items():
            before = joules()
            with _step(job, f"prefill with {names[side]}, run {number + 1} of {settings.repeats}", side, is_timed=True):
                timer.run()
            after = joules()
            used = None if before is None or after is None else after - before
            spent = getattr(job.state, side).joules
            total = used if spent is None or used is None else spent + used
            _tell(job, side, seconds=tuple(timer.seconds), joules=total)
    tokens = _answers(job, model, timers, settings.max_new_tokens)
    found = side_by_side(model, (timers["dense"], tokens["dense"]), (timers["sparse"], tokens["sparse"]))
    job.state = replace(job.state, step="", active=None, is_timed=False, comparison=_summary(found))
    return job.state


@contextmanager
def _step(job: Job, name: str, side: str | None, *, is_timed: bool = False) -> Iterator[None]:
    job.check()
    job.state = replace(job.state, step=name, active=side, is_timed=is_timed, began=time.monotonic())
    yield
    job.state = replace(job.state, active=None, is_timed=False)


def _tell(job: Job, side: str, **changes: object) -> None:
    job.state = replace(job.state, **{side: replace(getattr(job.state, side), **changes)})


def _answers(
    job: Job, model: LanguageModel, timers: dict[str, PrefillTimer], max_new_tokens: int
) -> dict[str, list[int]]:
    """Greedy tokens of both, one of each in turn: each up to its stop token, sparse at least as many as dense."""
    job.state = replace(job.state, step="answering", active=None, began=time.monotonic())
    streams = {side: model.decode(timer.result, max_new_tokens=max_new_tokens) for side, timer in timers.items()}
    pieces = {side: TextPieces(model.tokenizer) for side in SIDES}
    tokens: dict[str, list[int]] = {side: [] for side in SIDES}
    stopped = dict.fromkeys(SIDES, False)
    for _ in range(max_new_tokens):
        for side in SIDES:
            if stopped[side] and (side == "dense" or stopped["dense"]):
                continue
            job.check()
            (token,) = next(streams[side])
            tokens[side].append(int(token))
            if not stopped[side]:
                stopped[side] = int(token) in model.stop_tokens
                piece = pieces[side].finish() if stopped[side] else pieces[side].push(int(token))
                _tell(job, side, answer=getattr(job.state, side).answer + piece)
    for side in SIDES:
        _tell(job, side, answer=getattr(job.state, side).answer + ("" if stopped[side] else pieces[side].finish()))
    return tokens


def _summary(found: Comparison) -> Summary:
    density = found.density
    return Summary(
        dense_seconds=found.dense.median_seconds,
        sparse_seconds=found.sparse.median_seconds,
        speedup=found.speedup,
        density=None if density is None else float(density.mean()),
        density_range=None if density is None else (float(density.min()), float(density.max())),
        implementations=(found.dense.implementation, found.sparse.implementation),
        agreed=found.agreed,
        compared=found.compared,
        max_logit_difference=found.max_logit_difference,
        peak_bytes=found.peak_bytes,
        peak_of=found.peak_of,
    )

"""What the page asks for, checked and put into the device's queue. Knows nothing of Gradio."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax

from minference_jax.demo.inspections import run_inspection
from minference_jax.demo.jobs import Cancelled, Device, Job, done_now
from minference_jax.demo.models import Models
from minference_jax.demo.needle import make_example
from minference_jax.demo.plots import History, Point
from minference_jax.demo.runs import run_comparison
from minference_jax.demo.settings import Refused, Settings
from minference_jax.demo.visitors import Visitors
from minference_jax.generate import ATTENTION_NAMES, LanguageModel, bucket_length
from minference_jax.index import SlashGranularity
from minference_jax.measure import (
    ChosenAttention,
    Prompt,
    attention_of,
    default_sizes,
    encode_question,
    takes_granularity,
)
from minference_jax.measure.energy import EnergyCounter

ATTENTIONS = tuple(name for name in ATTENTION_NAMES if name != "dense")
MOST_SIZE = 1_000_000  # tokens or blocks of a pattern
_POLL_SECONDS = 0.2
_MOST_PROGRAMS = 64  # lengths and attentions whose programs are kept; Linux lets a process hold some hundreds


@dataclass(frozen=True)
class Request:
    """What a visitor asks about.

    Attributes:
        model: label.
        text, question: as typed.
        attention: one of ATTENTIONS.
        sizes: of the pattern, by name, as the page's number fields give them; what the attention lacks is left out.
        slash_granularity: for attentions with slashes.
    """

    model: str
    text: str
    question: str
    attention: str
    sizes: Mapping[str, Any]
    slash_granularity: str

    def chosen(self) -> ChosenAttention:
        """The attention.

        Raises:
            Refused: another attention or granularity than the page offers, or a size that is no number of tokens.
        """
        if self.attention not in ATTENTIONS or self.slash_granularity not in get_args(SlashGranularity):
            raise Refused("There is no such attention here.")
        sizes = {}
        for name in default_sizes(self.attention):
            value: Any = self.sizes.get(name)
            if not _is_whole(value):
                raise Refused(f"{name} must be a whole number.")
            if not 1 <= value <= MOST_SIZE:
                raise Refused(f"{name} must be between 1 and {MOST_SIZE:,}, not {value:,}.")
            sizes[name] = int(value)
        granularity: Any = self.slash_granularity if takes_granularity(self.attention) else None
        return attention_of(self.attention, sizes, granularity)


class Service:
    """A demo without its page.

    Args:
        settings: of the operator.
        models: of the operator.
        counter: of energy.
    """

    def __init__(self, settings: Settings, models: Models, counter: EnergyCounter):
        self.settings, self.models, self.counter = settings, models, counter
        self.device, self.history, self.visitors = Device(settings.max_queue), History(), Visitors()
        self._programs: set[object] = set()

    def submit_run(self, visitor: str, request: Request) -> Job:
        """Puts a comparison into the queue; its job's state is a `RunState`.

        Args:
            visitor: whose.
            request: what.

        Raises:
            Refused: what was asked for, or the queue is full.
        """

        def work(job: Job, model: LanguageModel, prompt: Prompt, attention: ChosenAttention) -> None:
            found = run_comparison(job, model, prompt, attention, self.settings, self.counter.read).comparison
            if found is not None and found.density is not None:  # else auto took dense attention
                times = found.dense.median_seconds, found.sparse.median_seconds
                self.history.add(Point(request.model, label_of(attention), len(prompt.tokens), *times))

        return self._submit(visitor, request, work)

    def submit_inspection(self, visitor: str, request: Request, layer: Any, head: Any) -> Job:
        """Puts an inspection into the queue; its job's state is an `InspectState`; raises as `submit_run`."""
        if not (_is_whole(layer) and _is_whole(head)):
            raise Refused("Layer and head must be whole numbers.")
        place = int(layer), int(head)

        def work(job: Job, model: LanguageModel, prompt: Prompt, attention: ChosenAttention) -> None:
            run_inspection(job, model, prompt, attention, place, self.settings)

        return self._submit(visitor, request, work)

    def submit_example(self, visitor: str, model: str, length: Any, depth: Any) -> Job:
        """Makes an example: at once, or where its model is not in memory, in the queue; raises as `submit_run`.

        The job's state is an `Example`.
        """
        if not _is_whole(length) or not isinstance(depth, int | float):
            raise Refused("Length and depth must be numbers, the length a whole one.")
        if not 0 <= depth <= 1:
            raise Refused("The depth must be between 0 and 1.")
        tokens = int(length)
        self.settings.check_tokens(tokens)
        ready = self.models.in_memory(model)

        def work(job: Job) -> None:
            job.state = make_example(ready or self._model(model), tokens, float(depth))

        return self.device.submit(visitor, work) if ready is None else done_now(work)

    def _submit(self, visitor: str, request: Request, work: Callable[..., None]) -> Job:
        attention = request.chosen()
        self.settings.check_text(request.text, request.question)
        ready = self.models.in_memory(request.model)
        if ready is not None:  # an over-long text is refused before it waits in the queue
            self._encode(ready, request)

        def begin(job: Job) -> None:
            model = self._model(request.model)
            prompt = self._encode(model, request)
            self._forget_programs((request.model, bucket_length(len(prompt.tokens)), attention))
            work(job, model, prompt, attention)

        return self.device.submit(visitor, begin)

    def _model(self, label: str) -> LanguageModel:
        try:
            return self.models.get(label)
        except MemoryError:
            raise Refused(f"{label} needs more memory than is free here.") from None
        except (ValueError, NotImplementedError, OSError) as error:
            print(f"minference-jax demo: {label} can't be loaded: {error}", file=sys.stderr)  # may name paths
            raise Refused(f"{label} can't be loaded; the operator's terminal says why.") from None

    def _encode(self, model: LanguageModel, request: Request) -> Prompt:
        prompt = encode_question(model, request.text, request.question)
        self.settings.check_tokens(len(prompt.tokens))
        needed, most = len(prompt.tokens) + self.settings.max_new_tokens, model.config.max_length
        if needed > most:
            raise Refused(
                f"The text with its question has {len(prompt.tokens):,} tokens and the answer up to "
                f"{self.settings.max_new_tokens}, and {request.model} has room for {most:,} in all: shorten the text."
            )
        return prompt

    def _forget_programs(self, key: object) -> None:
        """Drops compiled programs where visitors have asked for very many different ones."""
        self._programs.add(key)
        if len(self._programs) > _MOST_PROGRAMS:
            jax.clear_caches()
            self._programs = {key}


def _is_whole(value: Any) -> bool:
    """Whether what came from a page is a whole number; not so infinity and NaN."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def label_of(attention: ChosenAttention) -> str:
    """An attention in a legend: its name, and the sizes of its pattern."""
    sizes = "" if attention.pattern is None else " " + ", ".join(str(size) for size in vars(attention.pattern).values())
    return f"{attention.name}{sizes}{', block' if attention.slash_granularity == 'block' else ''}"


async def follow(job: Job, listens: Callable[[], bool]) -> AsyncIterator[None]:
    """Yields now and then until the job is done. Where the follower goes away before, the job is cancelled.

    Args:
        job: to be followed; it stops by itself where nobody listens for a while.
        listens: whether its visitor does.
    """
    try:
        while not job.done:
            if listens():
                job.seen()
            yield
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        if not job.done:
            job.cancel()


def outcome(job: Job) -> str:
    """One sentence about a job that is done and did not succeed; empty where it did.

    Raises:
        Exception: a fault of ours.
    """
    try:
        job.result()
    except Cancelled:
        return "Cancelled."
    except Refused as error:
        return str(error)
    except MemoryError:
        return "The device has too little memory for a text of this length: shorten it."
    except (ValueError, NotImplementedError) as error:
        return f"This can't be run: {error}."
    return ""

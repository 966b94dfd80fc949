"""What happens when a visitor presses something: the page's handlers, which yield what changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from minference_jax.demo import views
from minference_jax.demo.inspections import InspectState
from minference_jax.demo.jobs import Job
from minference_jax.demo.needle import Example
from minference_jax.demo.plots import history_picture
from minference_jax.demo.runs import RunState
from minference_jax.demo.service import Request, Service, follow, outcome
from minference_jax.demo.settings import Refused
from minference_jax.demo.shield import is_inside
from minference_jax.demo.uploads import read_upload
from minference_jax.measure import SIZES, default_sizes, takes_granularity

_FAULT = "The demo failed for a reason of its own; the operator's terminal says which."
_CANCELLING = "Cancelling: a prefill or compilation that runs can't be interrupted, the device stops behind it."


class Events:
    """Handlers.

    Args:
        gr: the module gradio.
        service: behind the page.
        folder: where uploads lie.
        forget: drops what Gradio keeps of a visitor.
        forget_silent: does so for all who have not listened for a while.
    """

    def __init__(
        self,
        gr: Any,
        service: Service,
        folder: Path,
        forget: Callable[[str], None],
        forget_silent: Callable[[], None],
    ):
        self._gr, self._service, self._folder = gr, service, folder
        self._forget, self._forget_silent = forget, forget_silent
        for handler in (Events.run, Events.inspect, Events.example, Events.cancel, Events.leave):
            handler.__annotations__["request"] = gr.Request  # what tells Gradio to pass one

    async def run(self, request: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Yields status, both buttons, numbers, answers, details, the plot and the map, which is of the run before."""
        skip = self._gr.skip()
        nothing = (
            views.numbers(None, 0.0),
            views.answers(None),
            views.details(None, no_energy=self._service.counter.reason),
        )
        submit = self._service.submit_run
        async for status, job in self._follow(lambda visitor: submit(visitor, _request(values)), request):
            state = job.state if job is not None else None
            if not isinstance(state, RunState):
                yield (*status, *(5 * [skip] if job is None else [*nothing, skip, ""]))
                continue
            numbers, rest = views.numbers(state, time.monotonic()), (views.answers(state), skip, skip)
            if state.comparison is not None and job is not None and job.done:
                rest = await asyncio.to_thread(self._end, state, str(values[0]))
            yield (*status, numbers, *rest, skip)

    def _end(self, state: RunState, model: str) -> tuple[Any, Any, Any]:
        """Answers, details and the plot of a run that is over."""
        picture = history_picture(self._service.history.of(model))
        plot = views.picture(picture, "seconds of a prefill against tokens of the prompt") or self._gr.skip()
        return views.answers(state), views.details(state, no_energy=self._service.counter.reason), plot

    async def inspect(self, request: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Yields status, both buttons, and the map with what is left out."""
        *own, layer, head = values
        submit = self._service.submit_inspection
        async for status, job in self._follow(lambda visitor: submit(visitor, _request(own), layer, head), request):
            state = job.state if job is not None else None
            over = isinstance(state, InspectState) and bool(state.picture)
            yield (*status, views.inspection(state) if over else self._gr.skip() if job is None else "")

    async def example(self, request: Any, model: Any, length: Any, depth: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Yields status, both buttons, text and question."""
        submit = self._service.submit_example
        async for status, job in self._follow(lambda visitor: submit(visitor, str(model), length, depth), request):
            if job is not None and isinstance(job.state, Example):
                said = f"The example has {job.state.tokens:,} tokens; the number {job.state.number} is hidden in it."
                yield (views.note(said), *status[1:], job.state.text, job.state.question)
            else:
                yield (*status, self._gr.skip(), self._gr.skip())

    def upload(self, path: str) -> tuple[Any, Any]:
        """Gives status and text; the file is gone then."""
        if not is_inside(path, self._folder):
            return views.note("There is no such upload here.", "bad"), self._gr.skip()
        self._forget_silent()
        try:
            raw = Path(path).read_bytes()
            Path(path).unlink()
        except OSError:
            return views.note("The upload is gone: please upload the file again.", "bad"), self._gr.skip()
        try:
            text = read_upload(raw, Path(path).name, max_characters=self._service.settings.max_characters)
        except Refused as error:
            return views.note(str(error), "bad"), self._gr.skip()
        return views.note(f"Read {len(text):,} characters; the file is deleted. Ask your question, then run."), text

    def attention(self, name: str) -> list[Any]:
        """Gives the visibility of the granularity and of each size."""
        own = default_sizes(name)
        return [self._gr.update(visible=takes_granularity(name)), *(self._gr.update(visible=s in own) for s in SIZES)]

    def cancel(self, request: Any) -> Any:
        """Gives the status where there is nothing to cancel; else what follows the job says what becomes of it."""
        found = self._service.device.cancel(request.session_hash)
        return self._gr.skip() if found else views.note("There is nothing to cancel.")

    def leave(self, request: Any) -> None:
        """The page was closed."""
        self._service.device.cancel(request.session_hash)
        self._forget(request.session_hash)

    async def _follow(
        self, submit: Callable[[str], Job], request: Any
    ) -> AsyncIterator[tuple[tuple[Any, Any, Any], Job | None]]:
        """Yields status and both buttons, with the job, until it is over."""
        button = self._gr.Button
        free = button(interactive=True), button(interactive=False)
        busy = button(interactive=False), button(interactive=True)
        visitor = request.session_hash
        self._forget_silent()
        try:
            job = await asyncio.to_thread(submit, visitor)  # tokenizes
        except Refused as error:
            yield (views.note(str(error), "bad"), self._gr.skip(), self._gr.skip()), None
            return
        steps = follow(job, lambda: self._service.visitors.listens(visitor))
        try:
            async for _ in steps:
                yield (self._status(job), *busy), job
        except (GeneratorExit, asyncio.CancelledError):  # the page went away
            self._forget(visitor)
            raise
        finally:
            await steps.aclose()  # type: ignore[attr-defined]
        try:
            said = outcome(job)
        except Exception:
            yield (views.note(_FAULT, "bad"), *free), job
            raise
        yield (views.note(said, "bad") if said else views.note("Done."), *free), job

    def _status(self, job: Job) -> str:
        if job.cancelled:
            return views.note(_CANCELLING, "busy")
        if ahead := self._service.device.before(job):
            return views.note(f"Waiting: {ahead} {'run is' if ahead == 1 else 'runs are'} before yours.", "busy")
        step = getattr(job.state, "step", "") or "preparing"
        return views.note(step[0].upper() + step[1:] + " ...", "busy")


def _request(values: Any) -> Request:
    model, text, question, attention, granularity, *sizes = values
    return Request(
        model=str(model),
        text=str(text or ""),
        question=str(question or ""),
        attention=str(attention),
        sizes=dict(zip(SIZES, sizes, strict=True)),
        slash_granularity=str(granularity),
    )

"""One job at a time on the device: a queue of bounded length, jobs that can be cancelled, and what they tell."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from minference_jax.demo.settings import Refused

PATIENCE = 30.0
"""Seconds after which a visitor who does not listen any more is taken to be gone, and his job stops."""


class Cancelled(Exception):
    """A job was asked to stop, or its visitor does not listen any more."""


EXPECTED = (Cancelled, Refused, ValueError, NotImplementedError, MemoryError)
"""What work may raise; anything else is a fault of ours, and its traceback is for the operator."""


class Job:
    """A piece of work for the device, seen from the page (state, cancel) and from the work (check, state).

    Attributes:
        state: what the work last told; None before it begins. It is replaced, never changed.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self._cancelled = threading.Event()
        self._seen = time.monotonic()
        self._future: Future[None] | None = None

    def cancel(self) -> None:
        """Asks the work to stop: at once where it waits, else at its next `check`."""
        self._cancelled.set()
        if self._future is not None:
            self._future.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """Whether the device is through with it."""
        return self._future is not None and self._future.done()

    def seen(self) -> None:
        """Says that the visitor still listens."""
        self._seen = time.monotonic()

    @property
    def is_forsaken(self) -> bool:
        """Whether its visitor has not listened for as long as a job may wait for that."""
        return time.monotonic() - self._seen > PATIENCE

    def check(self) -> None:
        """For the work, between two steps.

        Raises:
            Cancelled: it is to stop.
        """
        if self.cancelled or self.is_forsaken:
            raise Cancelled

    def result(self) -> None:
        """Raises what the work raised; Cancelled also where it never began. Only when `done`."""
        if self._future is None or self._future.cancelled():
            raise Cancelled
        self._future.result()


def done_now(work: Callable[[Job], None]) -> Job:
    """A job that needs no device and is done at once, on the caller's thread."""
    job = Job()
    job._future = Future()
    try:
        _work(job, work)
    except EXPECTED as error:
        job._future.set_exception(error)
    else:
        job._future.set_result(None)
    return job


def _work(job: Job, work: Callable[[Job], None]) -> None:
    try:
        job.check()
        work(job)
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        # Its frames hold what is on the device, until a collection of garbage that may be far off.
        error.__context__ = error.__cause__ = None
        raise error.with_traceback(None) from None


class Device:
    """Runs jobs one after another, on one thread.

    Args:
        max_queue: jobs that may wait while one runs.
    """

    def __init__(self, max_queue: int):
        self._max_queue = max_queue
        self._thread = ThreadPoolExecutor(1, "device")
        self._guard = threading.Lock()
        self._jobs: list[tuple[str, Job]] = []  # not done, in order

    def submit(self, visitor: str, work: Callable[[Job], None]) -> Job:
        """Puts a job into the queue.

        Args:
            visitor: whose; each may have one job at a time.
            work: is called with the job, on the device's thread.

        Raises:
            Refused: the queue is full, or the visitor has a job in it.
        """
        with self._guard:
            for _, job in self._jobs:
                if job.is_forsaken:
                    job.cancel()
            self._jobs = [(owner, job) for owner, job in self._jobs if not job.done]
            if any(owner == visitor for owner, _ in self._jobs):
                raise Refused("This page has a run that is not over yet: wait for it, or cancel it.")
            if len(self._jobs) > self._max_queue:
                waiting = len(self._jobs) - 1
                said = {0: "Somebody else's run is not over yet", 1: "1 run waits already"}
                raise Refused(
                    f"{said.get(waiting, f'{waiting} runs wait already')}: please come again in a few minutes."
                )
            job = Job()
            job._future = self._thread.submit(_work, job, work)
            self._jobs.append((visitor, job))
        return job

    def before(self, job: Job) -> int:
        """How many jobs come before this one."""
        with self._guard:
            ahead = [other for _, other in self._jobs]
            return sum(not other.done for other in ahead[: ahead.index(job)]) if job in ahead else 0

    def cancel(self, visitor: str) -> bool:
        """Cancels the visitor's job; whether there was one."""
        with self._guard:
            own = [job for owner, job in self._jobs if owner == visitor and not job.done]
        for job in own:
            job.cancel()
        return bool(own)

    def close(self) -> None:
        """Cancels everything and waits for the step that runs."""
        with self._guard:
            jobs = [job for _, job in self._jobs]
        for job in jobs:
            job.cancel()
        self._thread.shutdown()

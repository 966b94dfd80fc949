"""Which visitors listen: whose page has a connection open on which it hears what happens, and who fell silent."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from minference_jax.demo import jobs


class Visitors:
    """Counts the open connections of each visitor."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._silent_since: dict[str, float] = {}  # of those who were asked for
        self._guard = threading.Lock()

    @contextmanager
    def listening(self, visitor: str) -> Iterator[None]:
        """Around a connection on which a visitor hears what happens."""
        with self._guard:
            self._open[visitor] += 1
        try:
            yield
        finally:
            with self._guard:
                self._open[visitor] -= 1
                if not self._open[visitor]:
                    del self._open[visitor]

    def is_silent(self, visitor: str) -> bool:
        """Whether a visitor has had no such connection since this was first asked, longer ago than a job waits."""
        with self._guard:
            if visitor in self._open:
                self._silent_since.pop(visitor, None)
                return False
            since = self._silent_since.setdefault(visitor, time.monotonic())
            if time.monotonic() - since < jobs.PATIENCE:
                return False
            del self._silent_since[visitor]
            return True

    def listens(self, visitor: str) -> bool:
        """Whether a visitor has such a connection."""
        return visitor in self._open

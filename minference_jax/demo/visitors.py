"""Which visitors listen: whose page has a connection open on which it hears what happens."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Visitors:
    """Counts the open connections of each visitor."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
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

    def listens(self, visitor: str) -> bool:
        """Whether a visitor has such a connection."""
        return visitor in self._open

"""Progress bars on standard error, where that is a terminal or the user asks for them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

from minference_jax.convert.weight_source import ALREADY_WRITTEN, Progress

_TICK_SECONDS = 0.5


def wants_bars(asked: bool | None) -> bool:
    """Whether to draw: as asked, and where nothing was asked, on a terminal."""
    return sys.stderr.isatty() if asked is None else asked


class ByteBars:
    """A progress callback of converters that draws one bar for each phase (download, conversion, loading).

    Args:
        shown: whether to draw at all.
    """

    def __init__(self, shown: bool):
        self._shown = shown
        self._bar: tqdm | None = None
        self._phase: tuple[int, bool] | None = None

    def __enter__(self) -> ByteBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, done: int, total: int, name: str) -> None:
        """Bytes done, bytes in all, and the name of what is being done."""
        if not self._shown:
            return
        phase = total, name.endswith(".whl")
        if self._bar is None or phase != self._phase or done < self._bar.n:
            self._close()
            self._phase = phase
            label = "download" if name.endswith(".whl") else "weights"
            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr)
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Throughput:
    """A progress callback that passes on what it is told, and says at the end how much there is and how fast it went.

    Args:
        progress: the callback that is told, too.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._begin = time.monotonic()
        self._done = self._before = 0

    def __call__(self, done: int, total: int, name: str) -> None:
        """Bytes done, bytes in all, and the name of what is being done."""
        self._done = done
        if name == ALREADY_WRITTEN:
            self._before = done
        self._progress(done, total, name)

    def __str__(self) -> str:
        seconds = time.monotonic() - self._begin
        size = (self._done - self._before) / 1e6
        before = f", {self._before / 1e6:.1f} MB were written before" if self._before else ""
        return f"{size:.1f} MB in {seconds:.1f} s, {size / seconds:.0f} MB/s{before}"


class Steps:
    """A bar over a known number of named steps; its clock runs on inside a step that takes minutes.

    Args:
        total: how many steps there are.
        shown: whether to draw at all.
    """

    def __init__(self, total: int, shown: bool):
        self._bar = tqdm(total=total, unit="step", file=sys.stderr, disable=not shown, leave=False)
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Steps:
        if not self._bar.disable:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Shows the name while the block runs, then counts it as done."""
        self._bar.set_description(name)
        yield
        self._bar.update()

    def jump(self, done: int, name: str) -> None:
        """Counts so many as done, and shows the name of the next."""
        self._bar.set_description(name, refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def _tick(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            self._bar.refresh()


class StepsDone:
    """A progress callback that draws one bar over steps that somebody else counts; its clock runs on inside a step.

    Args:
        shown: whether to draw at all.
    """

    def __init__(self, shown: bool):
        self._shown = shown
        self._steps: Steps | None = None

    def __enter__(self) -> StepsDone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._steps is not None:
            self._steps.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int, name: str) -> None:
        """Steps done, steps in all, and what comes next."""
        if self._steps is None:
            self._steps = Steps(total, self._shown)
            self._steps.__enter__()
        self._steps.jump(done, name)

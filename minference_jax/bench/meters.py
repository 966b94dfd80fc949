"""What a run takes beside time: memory of the device and of the host, energy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from minference_jax.measure import host_peak, reset_host_peak

SAMPLE_SECONDS = 0.0002
"""How often the memory in use is looked at while a run lasts: XLA holds a program's own while it hands out work, which
for a few layers takes a millisecond."""


class Meter:
    """The peaks and the energy of the runs inside `running`, those of other runs apart.

    Args:
      joules: reads an energy counter; gives None where there is none.

    Attributes:
      peak_bytes: most memory of jax's device in use during a run: the device's own peak where the run raised it, else
        what was seen; None where the device does not count.
      host_peak_bytes: most memory of this process during a run; None = unknown.
      host_peak_of: "case", or "process" where the system can't begin that peak anew for each run.
      joules: of each run, of the whole card; None where there is no counter.
    """

    def __init__(self, joules: Callable[[], float | None]):
        self.read_joules = joules
        self.peak_bytes: int | None = None
        self.host_peak_bytes: int | None = None
        self.host_peak_of = "case"
        self.joules: list[float | None] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one run."""
        if not reset_host_peak():
            self.host_peak_of = "process"
        before = self.read_joules()
        with _sampled() as seen:
            yield
        after = self.read_joules()
        self.joules.append(None if before is None or after is None else after - before)
        self.peak_bytes = _most(self.peak_bytes, *seen)
        self.host_peak_bytes = _most(self.host_peak_bytes, host_peak())


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """Bytes in use on jax's device, looked at by a thread of its own; nothing where the device does not count."""
    device: Any = jax.devices()[0]
    seen: list[int] = []
    if "bytes_in_use" not in (device.memory_stats() or {}):
        yield seen
        return
    done, before = threading.Event(), device.memory_stats()["peak_bytes_in_use"]

    def look() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(device.memory_stats()["bytes_in_use"])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        peak = device.memory_stats()["peak_bytes_in_use"]
        if peak > before:
            seen.append(peak)

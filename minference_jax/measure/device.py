"""What computes, and the most memory it has held."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import jax


def device_name() -> str:
    """The device that jax computes on; for a CPU its model and the number of cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def peak_memory() -> tuple[int | None, str]:
    """The most memory held so far, in bytes, and whose: the device's where it says, else this process's."""
    statistics_of_device = jax.devices()[0].memory_stats()
    if statistics_of_device and "peak_bytes_in_use" in statistics_of_device:
        return int(statistics_of_device["peak_bytes_in_use"]), "device"
    return host_peak(), "process"


def memory_limit() -> int | None:
    """Bytes that jax may use of its default device; None = it does not say, as a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def host_peak() -> int | None:
    """The most memory that this process has held, in bytes, since it began or `reset_host_peak`; None = unknown."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # not ru_maxrss: a new process starts with what the one that started it held
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_host_peak() -> bool:
    """Begins `host_peak` anew from what is held now; False where the system does not let a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True

"""Energy of the NVIDIA GPU that jax computes on, from the counter that NVML keeps for the whole card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

LEAST_SECONDS = 1.0
"""Shorter prefills are not measured: the counter moves in steps that are too coarse for them."""


class EnergyCounter(NamedTuple):
    """An energy counter.

    Attributes:
        read: gives joules since the driver was loaded, of the whole card; None where there is no counter.
        reason: why there is none; empty where there is one.
    """

    read: Callable[[], float | None]
    reason: str


def open_counter(visible: str | None) -> EnergyCounter:
    """The counter of the device that jax computes on, or why there is none.

    Args:
        visible: the cards that CUDA may see, as in CUDA_VISIBLE_DEVICES; None = all.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        return _none("energy is measured on NVIDIA GPUs only")
    try:
        import pynvml
    except ImportError:
        return _none("energy needs the package nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, device.local_hardware_id, visible)
        named = pynvml.nvmlDeviceGetName(handle)
        if named != device.device_kind:
            return _none(f"NVML's card is {named}, jax's is {device.device_kind}: it is not clear which one computes")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, IndexError, ValueError) as error:
        return _none(f"this card has no energy counter: {error}")
    return EnergyCounter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, "")


def _handle(pynvml: Any, index: int, visible: str | None) -> Any:
    """The card that jax calls by an index, among those that CUDA may see."""
    name = visible.split(",")[index].strip() if visible else str(index)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _none(reason: str) -> EnergyCounter:
    return EnergyCounter(lambda: None, reason)

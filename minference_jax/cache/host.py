"""The cache in host memory: what is stored of each layer lies in pinned host memory and is fetched when it is read.

Fetching and computing layer by layer is in `minference_jax.generate.offloaded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax

KIND = "pinned_host"


class HostKV(NamedTuple):
    """Keys and values of prompts in pinned host memory, a pair of arrays for each layer.

    Attributes:
        k, v: for each layer [B, S, K, H].
        length: int32 [B], tokens of each prompt, on the device.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, slots of a row."""
        return self.k[0].shape[1]

    @property
    def kind(self) -> str:
        """How a file calls it."""
        return "host"


@dataclass(frozen=True)
class Host:
    """A policy: everything is kept, in the model's dtype, in pinned host memory."""

    name: ClassVar[str] = "host"


def check_host_memory(device: jax.Device) -> None:
    """Refuses, with NotImplementedError, a device that jax knows no pinned host memory of."""
    if KIND not in {memory.kind for memory in device.addressable_memories()}:
        raise NotImplementedError(f"kv_cache='host' needs pinned host memory, which {device} does not have in jax")


def to_host(x: jax.Array) -> jax.Array:
    """`x` on its way to pinned host memory; the call does not wait."""
    return jax.device_put(x, x.sharding.with_memory_kind(KIND))


def to_device(x: jax.Array) -> jax.Array:
    """`x` on its way to its device's own memory; the call does not wait."""
    (device,) = x.devices()
    return jax.device_put(x, x.sharding.with_memory_kind(device.default_memory().kind))

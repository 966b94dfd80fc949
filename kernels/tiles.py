"""Tile sizes: how many queries and keys one tile of work holds, and which sizes suit a device."""

from __future__ import annotations

import dataclasses

DTYPES = ("float32", "bfloat16", "float16")  # of queries, keys and values


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Rows and columns of one attention tile, in tokens, and how GPU kernels run tiles.

    A layout is built for one TileConfig and must be read with the same one. Its meaning depends on the first two.

    Args:
      block_q: queries per tile; a multiple of ``block_kv``.
      block_kv: keys per tile; a power of two.
      num_warps: warps of 32 threads per GPU program, a power of two.
      num_stages: depth of the pipeline that loads keys and values into a GPU's shared memory.

    Raises:
      ValueError: a size is not as above.
    """

    block_q: int = 64
    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("block_kv", "num_warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two")
        if self.block_q < 1 or self.block_q % self.block_kv:
            raise ValueError(f"block_q={self.block_q} must be a positive multiple of block_kv={self.block_kv}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice of kernel and tiles depends on.

    Args:
      platform: "cpu", "cuda", "rocm", "tpu", ...
      kind: the device's name, such as "NVIDIA H100 80GB HBM3".
      compute_capability: of an NVIDIA GPU, as (major, minor); else None.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program of an NVIDIA GPU may use."""
        if self.compute_capability is None:
            return 0
        big = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
        return big.get(self.compute_capability, 101376)


def compute_capability(device: Device) -> tuple[int, int]:
    """That of a GPU on which GPU kernels run; NotImplementedError: it is no NVIDIA GPU of 8.0 or later."""
    if device.compute_capability is None or device.compute_capability < (8, 0):
        raise NotImplementedError(f"it needs an NVIDIA GPU of compute capability 8.0 or later, not {device.kind}")
    return device.compute_capability


def check_head_dim(head_dim: int) -> None:
    """Refuses, with NotImplementedError, a head_dim that the Triton attention kernel can't do."""
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise NotImplementedError(f"{head_dim=} must be a multiple of 16 from 16 to 256")


def shared_memory_bytes(tiles: TileConfig, head_dim: int, itemsize: int) -> int:
    """Shared memory that the Triton attention kernel uses at most, in bytes: queries, staged keys and values, rest."""
    rows = tiles.block_q + 2 * tiles.num_stages * tiles.block_kv
    return rows * head_dim * itemsize + 1024


def check_triton_tiles(tiles: TileConfig, device: Device, head_dim: int, itemsize: int) -> None:
    """Refuses tiles that the Triton kernel can't use on a device, before its compiler does.

    Raises:
      ValueError: sizes that are not powers of two of at least 16, or more shared memory than the device has.
    """
    for name in ("block_q", "block_kv"):
        size = getattr(tiles, name)
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name}={size} must be a power of two of at least 16 for the Triton kernel")
    _check_memory(tiles, shared_memory_bytes(tiles, head_dim, itemsize), device, head_dim)


def _check_memory(tiles: TileConfig, needed: int, device: Device, head_dim: int) -> None:
    if device.compute_capability is not None and needed > device.shared_memory:
        raise ValueError(
            f"{tiles} needs {needed} bytes of shared memory at {head_dim=}, {device.kind} has {device.shared_memory}"
        )


def check_xla_tiles(tiles: TileConfig, device: Device, head_dim: int, itemsize: int) -> None:
    """Refuses tiles that the pure JAX kernel can't use.

    Raises:
      ValueError: more than 256 keys.
    """
    if tiles.block_kv > 256:
        raise ValueError(f"block_kv={tiles.block_kv} must be at most 256 for the pure JAX kernel")


def xla_tiles(device: Device, head_dim: int, itemsize: int) -> TileConfig:
    """The tiles of the pure JAX kernels, the same on every device."""
    return TileConfig()


def tiles_of(*sizes: int) -> TileConfig:
    """The tiles of all four sizes, in the order of the fields; raises as TileConfig does."""
    return TileConfig(**dict(zip((field.name for field in dataclasses.fields(TileConfig)), sizes, strict=True)))


TRITON_TILES = {
    2: ((128, tiles_of(64, 64, 4, 2)), (256, tiles_of(64, 64, 8, 2)), (256, tiles_of(64, 32, 8, 2))),
    4: ((64, tiles_of(32, 32, 4, 2)), (256, tiles_of(32, 16, 8, 2))),
}
"""Tiles of the Triton kernel by bytes of an element, each up to a head_dim: none of them spills registers.

Tiles of 64 queries keep least of scattered slashes: on an H100 they beat 128 by 64, which run at a higher rate.
"""


def triton_tiles(device: Device, head_dim: int, itemsize: int) -> TileConfig:
    """Tiles of the Triton kernel for a device.

    Args:
      device: an NVIDIA GPU.
      head_dim: H.
      itemsize: bytes of one element of q, k and v.

    Raises:
      NotImplementedError: the device is no NVIDIA GPU of compute capability 8.0 or later, or too small.
    """
    compute_capability(device)
    check_head_dim(head_dim)
    for widest, tiles in TRITON_TILES[itemsize]:
        if head_dim <= widest and shared_memory_bytes(tiles, head_dim, itemsize) <= device.shared_memory:
            return tiles
    raise NotImplementedError(f"no tile of {head_dim=} fits the shared memory of {device.kind}")


def mosaic_gpu_moves_registers() -> bool:
    """Whether warpgroups of the Mosaic GPU kernel get registers from each other.

    From 0.12 on JAX compiles kernels with nvJitLink, for which ptxas makes what other code could be linked to: it
    ignores ``setmaxnreg`` then (and says so, C7504), and all threads keep the 168 that they start with.
    """
    import jax  # here: the command line knows tiles before it needs jax

    return jax.__version_info__ < (0, 12)


def mosaic_gpu_widest() -> int:
    """The largest head_dim of the Mosaic GPU kernel: the sums of a larger one do not fit the registers."""
    return 256 if mosaic_gpu_moves_registers() else 192


def mosaic_gpu_stage_keys(head_dim: int) -> int:
    """Keys of a stage of the Mosaic GPU kernel: above a head_dim of 128 registers hold no more than 64 scores a row."""
    return 128 if head_dim <= 128 else 64


def mosaic_gpu_shared_memory_bytes(tiles: TileConfig, head_dim: int) -> int:
    """Shared memory of the Mosaic GPU kernel, in bytes: queries, the keys and values of every stage, rest."""
    row = -(-head_dim // 64) * 64 * 2
    rows = 128 + 2 * tiles.num_stages * mosaic_gpu_stage_keys(head_dim)
    return rows * row + 512 * tiles.num_stages + 1024


def check_mosaic_gpu_tiles(tiles: TileConfig, device: Device, head_dim: int, itemsize: int) -> None:
    """Refuses tiles that the Mosaic GPU kernel can't use.

    Raises:
      ValueError: sizes other than 64 by 64 and 128 by 128, other than 4 warps, or more shared memory than there is.
    """
    if (tiles.block_q, tiles.block_kv) not in ((64, 64), (128, 128)) or tiles.num_warps != 4:
        raise ValueError(
            f"{tiles} must be 64 queries by 64 keys or 128 by 128 for the Mosaic GPU kernel, with num_warps=4, those "
            "of a warpgroup"
        )
    _check_memory(tiles, mosaic_gpu_shared_memory_bytes(tiles, head_dim), device, head_dim)


def mosaic_gpu_tiles(device: Device, head_dim: int, itemsize: int) -> TileConfig:
    """Tiles of the Mosaic GPU kernel for a device.

    Args:
      device: an NVIDIA GPU.
      head_dim: H.
      itemsize: bytes of one element of q, k and v.

    Raises:
      NotImplementedError: the device is not of the Hopper generation, or the kernel can't do that head_dim or dtype.
    """
    if device.compute_capability != (9, 0):
        raise NotImplementedError(f"it needs an NVIDIA GPU of compute capability 9.0, not {device.kind}")
    if itemsize != 2 or head_dim % 8 or not 64 <= head_dim <= mosaic_gpu_widest():
        raise NotImplementedError(
            "it needs bfloat16 or float16 and a head_dim that is a multiple of 8 from 64 to 256, or to 192 from jax "
            f"0.12 on, not {head_dim} in {itemsize} bytes"
        )
    choices = (TileConfig(num_stages=stages) for stages in (4, 3, 2))
    return next(x for x in choices if mosaic_gpu_shared_memory_bytes(x, head_dim) <= device.shared_memory)

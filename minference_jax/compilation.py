"""Compiled programs that outlive the process: XLA's persistent cache, with keys that stay when code moves."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

_XLA_CACHES = "xla_gpu_per_fusion_autotune_cache_dir"  # a folder of this name among the programs: what XLA chose


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs in a folder and takes them from there, from now on in this process.

    XLA's choices among GPU programs, which it makes by timing them, are kept with them and by themselves, so that a new
    program that holds a matrix product of another one does not choose for it again. A program is found again by later
    processes with the same versions of jax and of the driver, on the same kind of device, from whatever place in the
    code it is called. To that end jax is told to leave source lines out of programs, so its profiler shows none.
    Programs that the process has compiled before are not written: call this first. Nothing is ever removed; delete the
    folder, or set `jax_compilation_cache_max_size`.

    Args:
        folder: made where there is none; None = "programs" in this user's cache folder.

    Returns:
        The folder.

    Raises:
        OSError: it can't be made or written to.
    """
    path = Path(
        platformdirs.user_cache_path("minference-jax", appauthor=False) / "programs" if folder is None else folder
    )
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"nothing can be written in {path}: name another folder for compiled programs")
    jax.config.update("jax_compilation_cache_dir", str(path.resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # hundreds of small programs are seconds, too
    jax.config.update("jax_persistent_cache_enable_xla_caches", _XLA_CACHES)
    jax.config.update("jax_traceback_in_locations_limit", 0)  # a GPU kernel's lines are part of what is hashed
    compilation_cache.reset_cache()  # else a process that has compiled already goes on without
    return path

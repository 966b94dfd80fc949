"""What Nsight Compute counts while one kernel of the attention suite runs: one JSON line a kernel.

Needs an NVIDIA GPU and ``ncu``. It runs the kernel once for every few counters and saves what it writes in between, so
``--heads`` takes fewer heads than the case has: programs of a head run beside each other, not beside those of others.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from minference_jax.bench import attention, cases, inputs
from minference_jax.bench.records import environment

COUNTERS = {
    "kernel_ns": "gpu__time_duration.sum",
    "tensor_cores": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "shared_memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "copied_bytes": "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld.sum",
    "l2_out": "lts__lts2xbar_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
"""Field and counter: nanoseconds, bytes that the copy engine brought to the multiprocessors, else percent of what could
be. "exponentials" is the unit of special functions, "l2_out" the way from L2 to the multiprocessors."""
RECORDS = Path(__file__).parent / "results" / "profile.jsonl"
KERNELS = "regex:mosaic|cudnn|sparse_attention"


def profile(arguments: argparse.Namespace) -> None:
    """Runs this file in ncu and adds a line to the output.

    Raises:
      RuntimeError: ncu failed, or saw none of ``KERNELS``.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, described = Path(folder) / "report.ncu-rep", Path(folder) / "described.json"
        inside = [sys.executable, __file__, *sys.argv[1:], "--inside", str(described)]
        asked = ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name", KERNELS]
        counters = ",".join(COUNTERS.values())
        # The platform's allocator: ncu would save the whole pool that a kernel's output lies in.
        settings = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_FLAGS": "--xla_gpu_enable_command_buffer="}
        _output_of(["ncu", *asked, "--metrics", counters, "--export", str(report), *inside], os.environ | settings)
        page = _output_of(
            ["ncu", "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"], os.environ
        )
        one = json.loads(described.read_text("utf-8")) | counted(page)
    with open(arguments.output, "a", encoding="utf-8") as file:
        file.write(json.dumps(one) + "\n")
    print(json.dumps(one, indent=2))


def _output_of(command: list[str], settings) -> str:
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def counted(page: str) -> dict[str, str | float]:
    """The kernel of a raw page that took longest, and what was counted in it.

    Raises:
      RuntimeError: the page has no kernel.
    """
    heading, *rest = (row for row in csv.reader(io.StringIO(page)) if len(row) > 1)
    rows = [dict(zip(heading, row, strict=True)) for row in rest[1:]]  # the first are units
    if not rows:
        raise RuntimeError(f"no kernel was profiled whose name matches {KERNELS}")
    values = [{field: float(row[name].replace(",", "")) for field, name in COUNTERS.items()} for row in rows]
    longest = max(range(len(rows)), key=lambda i: values[i]["kernel_ns"])
    return {"kernel": rows[longest]["Kernel Name"], **values[longest]}


def run(arguments: argparse.Namespace) -> None:
    """The kernel twice, to compile it and to be profiled; writes what it is."""
    on_cudnn = arguments.implementation == "cudnn"
    bench = attention.Bench(implementation=None if on_cudnn else arguments.implementation)
    case, *others = cases.select_cases(bench.cases(), [arguments.case])
    if others or (on_cudnn and case.name != "dense"):
        raise ValueError(f"{arguments.case!r} must be the name of one case, and 'dense' with cudnn")
    heads = arguments.heads or case.num_heads
    case = dataclasses.replace(case, num_heads=heads, num_kv_heads=heads * case.num_kv_heads // case.num_heads)
    entry, tiles = bench.choose(case)
    qkv = inputs.random_activations(case, arguments.length)
    calls = attention.prepare(case, arguments.length, entry, tiles, qkv, estimated=False)
    name, baseline = bench.baseline(case)
    call = (lambda: baseline(*qkv)) if on_cudnn else lambda: calls.kernel(*qkv, calls.layout)
    jax.block_until_ready(call())
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuProfilerStart()
    jax.block_until_ready(call())
    cuda.cuProfilerStop()
    shape = {field: getattr(case, field) for field in ("num_heads", "num_kv_heads", "head_dim", "dtype")}
    described = {
        "case": case.name,
        "pattern": cases.describe(case.sizes_at(arguments.length, tiles), tiles, constructed=True),
        "implementation": name if on_cudnn else entry.name,
        "length": arguments.length,
    }
    Path(arguments.inside).write_text(json.dumps(described | shape | environment()), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help='of `minference-jax bench attention`, such as "VS line"')
    parser.add_argument("length", type=int, help="tokens")
    parser.add_argument("--implementation", default="mosaic_gpu", help="mosaic_gpu (without it), triton or cudnn")
    parser.add_argument(
        "--heads", type=int, help="query heads, as many of a KV head as in the case; without it its own"
    )
    parser.add_argument("--output", default=str(RECORDS), help="file of JSON lines (results/profile.jsonl)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the file for what ran, in the process that ncu watches
    given = parser.parse_args()
    (run if given.inside else profile)(given)

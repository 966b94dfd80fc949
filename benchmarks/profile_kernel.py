"""What Nsight Compute counts while one kernel of the attention suite runs: one JSON line a kernel.

Needs an NVIDIA GPU of the Hopper generation, whose copy engine is counted, and ``ncu``. It runs the kernel once for
every few counters and saves what it writes in between, so ``--heads`` takes fewer heads than the case has: programs of
a head run beside each other, not beside those of others.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from minference_jax.bench import attention, cases, inputs
from minference_jax.bench.records import environment
from minference_jax.implementations import device_of

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
      ValueError: no such case, length or heads.
      FileNotFoundError: there is no ncu.
      RuntimeError: ncu failed, or saw none of ``KERNELS``.
    """
    chosen_case(arguments)
    if shutil.which("ncu") is None:
        raise FileNotFoundError("ncu, of Nsight Compute, is not on the PATH")
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
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"{command[0]} failed: {' '.join(said[-3:])}")
    return done.stdout


def counted(page: str) -> dict[str, str | float]:
    """The kernel of a raw page that took longest, and what was counted in it.

    Raises:
      RuntimeError: the page has no kernel.
    """
    table = [row for row in csv.reader(io.StringIO(page)) if len(row) > 1]
    if len(table) < 3:  # names, units, kernels
        raise RuntimeError(f"no kernel was profiled whose name matches {KERNELS}")
    rows = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    values = [{field: float(row[name].replace(",", "")) for field, name in COUNTERS.items()} for row in rows]
    longest = max(range(len(rows)), key=lambda i: values[i]["kernel_ns"])
    return {"kernel": rows[longest]["Kernel Name"], **values[longest]}


def chosen_case(arguments: argparse.Namespace) -> cases.Case:
    """The case with its heads.

    Raises:
      ValueError: no such case, length or heads.
    """
    case, *others = cases.select_cases(cases.GPU_CASES, [arguments.case])
    if others or (arguments.implementation == "cudnn" and case.name != "dense"):
        raise ValueError(f"{arguments.case!r} must be the name of one case, and 'dense' with cudnn")
    if arguments.length < 1:
        raise ValueError(f"length {arguments.length} must be at least 1")
    heads = case.num_heads if arguments.heads is None else arguments.heads
    group = case.num_heads // case.num_kv_heads
    if heads < 1 or heads % group:
        raise ValueError(f"--heads {heads} must be a positive multiple of {group}, the query heads of a KV head")
    return dataclasses.replace(case, num_heads=heads, num_kv_heads=heads // group)


def run(arguments: argparse.Namespace) -> None:
    """The kernel twice, to compile it and to be profiled; writes what it is.

    Raises:
      NotImplementedError: there is no such GPU, or the implementation can't do the case on it.
      RuntimeError: CUDA does not begin to be profiled.
    """
    if device_of().platform != "cuda":
        raise NotImplementedError(f"it needs an NVIDIA GPU, not {device_of().kind}")
    on_cudnn = arguments.implementation == "cudnn"
    bench = attention.Bench(implementation=None if on_cudnn else arguments.implementation)
    case = chosen_case(arguments)
    entry, tiles = bench.choose(case)
    qkv = inputs.random_activations(case, arguments.length)
    calls = attention.prepare(case, arguments.length, entry, tiles, qkv, estimated=False)
    name, baseline = bench.baseline(case)
    if on_cudnn and "cudnn" not in name:
        raise NotImplementedError(f"cuDNN can't do {case.name} here")
    call = (lambda: baseline(*qkv)) if on_cudnn else lambda: calls.kernel(*qkv, calls.layout)
    jax.block_until_ready(call())
    cuda = ctypes.CDLL("libcuda.so.1")
    if status := cuda.cuProfilerStart():
        raise RuntimeError(f"cuProfilerStart gave {status}")
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
    names = ("mosaic_gpu", "triton", "cudnn")
    parser.add_argument("--implementation", default=names[0], choices=names, help="without it mosaic_gpu")
    parser.add_argument(
        "--heads", type=int, help="query heads, as many of a KV head as in the case; without it its own"
    )
    parser.add_argument("--output", default=str(RECORDS), help="file of JSON lines (results/profile.jsonl)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the file for what ran, in the process that ncu watches
    given = parser.parse_args()
    try:
        (run if given.inside else profile)(given)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        parser.error(str(error))

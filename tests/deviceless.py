"""Compiles jitted functions that hold Pallas kernels for NVIDIA GPUs on a machine that need not have one.

It shows that a kernel lowers and compiles, the registers it takes, what it spills, its shared memory and whether it has
wgmma instructions; not that it is right, nor how fast. It needs the packages of the ``compiler`` extra and no driver.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Something to compile.

    Attributes:
        name: what its report is found by.
        function: of arrays alone; bind everything else with functools.partial.
        arguments: pytrees of jax.ShapeDtypeStruct, one for each argument.
        products: whether the report is of matrix products by XLA, and not of Pallas kernels.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    products: bool = False


class Report(NamedTuple):
    """What the compilers say of the Pallas kernels of a function; XLA's own kernels are left out.

    Attributes:
        name: of the case.
        registers: per thread, of the kernel that takes most; at most 255.
        spill_bytes: stores and loads of registers to memory, the code's and not the run's, of all kernels together.
        shared_bytes: shared memory of a program, of the Triton kernel that takes most; 0 = not known. Mosaic GPU raises
            an error where there is too little.
        wgmma: whether a Triton kernel uses Hopper's warpgroup matrix products.
        serialized: whether those of a Mosaic GPU kernel wait for each other, because ptxas is not sure of registers.
        error: why there is nothing of the above, or None.
        products: what computes each matrix product, a cuBLASLt call or "dot" (in a Triton kernel of XLA's), and the
            dtypes of its operands and its result, such as "dot bf16 bf16 -> f32".
        transposes: dtypes of the arrays that kernels do nothing but transpose.
    """

    name: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    wgmma: bool = False
    serialized: bool = False
    error: str | None = None
    products: Sequence[str] = ()
    transposes: Sequence[str] = ()


class Card(NamedTuple):
    """A GPU as XLA's compiler must know it. Sizes are in bytes; shared memory is that of a program, and of a core."""

    name: str
    capability: str
    shared_memory_limit: int
    shared_memory: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2_cache: int


CARDS = {
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability="8.0",
        shared_memory_limit=166912,
        shared_memory=167936,
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        memory=85100068864,
        bandwidth=2039040000000,
        l2_cache=41943040,
    ),
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability="9.0a",
        shared_memory_limit=232448,
        shared_memory=233472,
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        memory=84942979072,
        bandwidth=3352320000000,
        l2_cache=52428800,
    ),
}

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-nvjitlink")
SECONDS = 900
_MARK = "report: "


def available() -> str | None:
    """Says why compile_cases can't work in this environment, or None where it can."""
    versions = {}
    for package in ("jaxlib", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"no GPU compiler: {package} is not installed, see the compiler extra"
    for package in PACKAGES[:2]:
        if versions[package] != versions["jaxlib"]:
            return f"no GPU compiler: {package} {versions[package]} is not for jaxlib {versions['jaxlib']}"
    return None


def compile_cases(kind: str, path: str, variable: str = "CASES") -> dict[str, Report]:
    """Compiles cases for a card, in a Python of its own: XLA reads once where to dump and which platforms there are.

    A case that does not lower or compile has its error in its report.

    Args:
        kind: key of CARDS.
        path: file of Python code with the cases. That other Python runs it too, in order to have them.
        variable: name of a global of that file, an iterable of Case.

    Raises:
        RuntimeError: the other Python failed, as when the compiler crashes; it says at which case.
        subprocess.TimeoutExpired: there was no end after SECONDS; too large a tile can take hours.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-P", __file__, kind, str(Path(path).resolve()), variable],
            cwd=folder,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    if done.returncode:
        raise RuntimeError(f"compiling {variable} of {path} for {kind}: exit {done.returncode}\n{done.stderr[-4000:]}")
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    return {report.name: report for report in (Report(**json.loads(line)) for line in lines)}


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "CUDA_"))}
    kept["JAX_PLATFORMS"] = "cpu"  # else the plugin looks for cuDNN, and withdraws where there is none
    # Launches, HLO and, in 0.10.2, PTX are dumped anyway. 0.12.0 dumps PTX only when asked for it by this name; to ask
    # for everything (.*) costs ten seconds and tens of MB a kernel. The folder is relative: XLA splits at spaces.
    kept["XLA_FLAGS"] = "--xla_dump_to=. --xla_dump_emitter_re=ptx"
    kept["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # what ptxas says of a Mosaic GPU kernel, to the standard error or output
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return kept


def _target(card: Card) -> str:
    """Gives the card in the text form of XLA's GpuTargetConfigProto."""
    major, minor = card.capability[0], card.capability[2]
    extension = "ACCELERATED_FEATURES" if card.capability.endswith("a") else "NONE"
    return f"""
platform_name: "CUDA"
device_description_str: "{card.name}"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
gpu_device_info {{
  name: "{card.name}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {card.capability}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
  core_count: {card.cores} fpus_per_core: {card.fpus_per_core} clock_rate_ghz: {card.clock_ghz}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {card.shared_memory} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {card.shared_memory_limit}
  device_memory_size: {card.memory} memory_bandwidth: {card.bandwidth} l2_cache_size: {card.l2_cache}
}}
"""


def _compile(kind: str, case: Case) -> None:
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=_target(CARDS[kind]), topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # from 0.11 on the Triton lowering takes the card from it
        jax.jit(case.function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Sends what compilers written in C++ print inside the block to a file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def _mosaic_report(name: str, said: str) -> Report | None:
    """Reads what ptxas said of Mosaic GPU kernels; None where it said nothing."""
    registers = [int(size) for size in re.findall(r"Used (\d+) registers", said)]
    of_kernels = "\n".join(line for line in said.splitlines() if "stack frame" in line)
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", of_kernels))
    serialized = "wgmma.mma_async instructions are serialized" in said
    return Report(name, max(registers), spills, serialized=serialized) if registers else None


def _report(name: str, folder: Path) -> Report:
    """Reads what XLA dumped of Triton kernels: the parts that jax 0.10.2, 0.11.2 and 0.12.0 write alike.

    The HLO names the Pallas kernels. The shared memory of a Triton kernel is dynamic: it is in the launch and not in
    the PTX. Registers and spills are those of ptxas on the PTX. In 0.10.2 XLA runs the same ptxas with no option that
    matters; 0.12.0 goes through nvJitLink, which is ptxas as a library.
    """
    hlo = "".join(path.read_text() for path in folder.glob("*gpu_after_optimizations.txt"))
    names = re.findall(r'custom_call_target="__gpu\$xla\.gpu\.triton".* name = "(\w+)"', hlo)
    ours = re.compile(rf"({'|'.join(names)})(__\d+)?").fullmatch  # a second kernel of one name has a number after it
    launches = "".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    shared = {
        kernel: int(size)
        for kernel, size in re.findall(r" (\w+) grid: .* shared_memory: (\d+) bytes", launches)
        if ours(kernel)
    }
    if not shared:
        raise RuntimeError("it launches no Pallas kernel")
    registers, spills, wgmma = {}, 0, False
    for path in folder.glob("*.ptx"):
        ptx = path.read_text()
        (kernel,) = re.findall(r"\.entry (\w+)", ptx) or [""]  # each has a file of its own; one is empty
        if ours(kernel):
            said = _ptxas(path, re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1])
            registers[kernel] = int(re.search(r"Used (\d+) registers", said)[1])
            spills += sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
            wgmma |= "wgmma.mma_async" in ptx
    if registers.keys() != shared.keys():
        raise RuntimeError(f"it launches {sorted(shared)} and has PTX of {sorted(registers)}")
    return Report(name, max(registers.values()), spills, max(shared.values()), wgmma)


def _products(name: str, folder: Path) -> Report:
    """Reads the matrix products in the HLO that XLA dumped."""
    hlo = "".join(path.read_text() for path in folder.glob("*gpu_after_optimizations.txt"))
    dtypes, found = {}, []
    for line in hlo.splitlines():  # an array is named before it is used, and again in another computation
        made = re.match(r" *(?:ROOT )?(%[\w.-]+) = \(?(\w+)\[", line)
        if made:
            dtypes[made[1]] = made[2]
        call = re.search(r" (dot|custom-call)\(([^)]*)\)", line)
        target = re.search(r'custom_call_target="__(cublas\$lt\$matmul[^"]*)"', line)
        if made and call and (call[1] == "dot" or target):
            sides = [dtypes[side.split()[-1]] for side in call[2].split(", ")[:2]]
            found.append(f"{target[1] if target else call[1]} {' '.join(sides)} -> {made[2]}")
    transposes = re.findall(r"%\w*transpose[\w.]* = (\w+)\[.* fusion\(", hlo)
    return Report(name, products=sorted(found), transposes=transposes)


def _ptxas(path: Path, architecture: str) -> str:
    """Gives what ptxas -v says of a file."""
    home = Path(importlib.util.find_spec("nvidia.cu13").submodule_search_locations[0])
    command = [home / "bin" / "ptxas", "-v", f"-arch={architecture}", "-o", os.devnull, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _main(kind: str, path: str, variable: str) -> None:
    folder = Path.cwd()
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = list(getattr(module, variable))
    if len({case.name for case in cases}) < len(cases):
        raise ValueError(f"two cases of one name: {[case.name for case in cases]}")
    for case in cases:
        print(f"compiling {case.name}", file=sys.stderr, flush=True)
        for file in folder.iterdir():
            file.unlink()
        try:
            with _said(folder / "said"):
                _compile(kind, case)
            report = _mosaic_report(case.name, (folder / "said").read_text(errors="replace"))
            report = report or (_products if case.products else _report)(case.name, folder)
        except Exception as error:  # whatever it is, it belongs in the report
            report = Report(case.name, error=f"{type(error).__name__}: {error}")
        print(_MARK + json.dumps(report._asdict()), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

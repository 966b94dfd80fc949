"""One measured case as one JSON line, and README tables made from such lines."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

from minference_jax.implementations import device_of
from minference_jax.measure import device_name

FIELDS = (
    *("suite", "case", "attention", "pattern", "slash_granularity", "lists", "implementation", "tiles"),
    *("length", "batch", "num_heads", "num_kv_heads", "head_dim", "dtype", "linear", "layers", "model_layers"),
    *("chunk_size", "kv_cache"),
    *("density", "ms", "ms_spread", "extrapolated_ms", "tokens_per_second", "compile_ms"),
    *("linear_ms", "cache_ms", "estimate_ms", "index_ms", "kernel_ms", "baseline", "baseline_ms", "ratio"),
    "decode_ms",
    *(
        "tflops_kept",
        "tflops_baseline",
        "error",
        "peak_bytes",
        "planned_bytes",
        "host_peak_bytes",
        "host_peak_of",
        "joules",
    ),
    *("skip_threshold", "skip_ms", "skip_error"),
    *("device", "driver", "jax", "jaxlib", "commit", "date"),
)
"""The same in every suite; null where a thing was not measured.

ms = index_ms + kernel_ms, medians; ms_spread = [least, most]; estimate_ms is the part of index_ms that sums attention
mass; ratio = ms / baseline_ms. tflops_kept is the work of the kept tiles over kernel_ms (over ms where that is null),
tflops_baseline that of causal attention over baseline_ms. lists: "constructed", or "activations" = estimated from saved
ones; null = constructed. tiles: queries x keys x warps x stages. error: the largest absolute in float32, the relative
Frobenius norm over a query tile in half precision; in suite "models" the largest difference of logits over the largest
logit. In suite "search" it is that of a layer's attention output relative to dense attention's, mean over the layers.
skip_ms, skip_error: of the kernel with `skip_threshold`, beside kernel_ms and error without one.
peak_bytes: most device memory that inputs, index and kernel took, null where an earlier measurement of the
process took more; in suite "convert" the host memory of a step, with what it loads where jax computes on the CPU.

Suite "prefill", whole prefills: linear is "fp8" where linear layers are of 8-bit numbers, null where of `dtype`. ms,
compile_ms and all else are of the `layers` that were run; where the model has more, `model_layers`, extrapolated_ms =
ms * model_layers / layers, which was not measured. linear_ms is a prefill whose attention gives back its queries:
everything but attention, with the embedding, the writes to the cache and the logits.
cache_ms (these writes, so a part of linear_ms; with kv_cache "host" the copies, which a prefill hides), index_ms,
estimate_ms and kernel_ms are each timed alone, one call for every layer, on that layer's own arrays, and summed: each
call waits for the one before, which counts where a part takes less than a millisecond a layer. What ms has beyond
linear_ms, index_ms and kernel_ms is in no part.
decode_ms: of one token of an answer behind the prompt, median.
lists: what the lists were estimated from, live, in each prefill. kv_cache: the policy's name. peak_bytes: of the
device, seen during the case's own timed runs; planned_bytes: what `plan_memory` says of the same prefill.
host_peak_bytes: of the process, in these runs where host_peak_of is "case", since it began where it is "process".
joules: of the whole card in one prefill, mean.
"""


_BEGIN = b'{"suite": '


def driver() -> str | None:
    """The driver's version where jax computes on an NVIDIA GPU; None elsewhere, or where it is not said."""
    if device_of().platform != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] if said else None


def peak_bytes() -> int | None:
    """Most bytes in use at a time on jax's device since the process began; None where the device does not count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def commit() -> str | None:
    """The commit of the source tree, with a plus where it has uncommitted changes; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """What a measurement depends on beside its case: device, driver, versions, commit and date."""
    return {
        "device": device_name(),
        "driver": driver(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def record(**measured: Any) -> dict[str, Any]:
    """A complete record.

    Args:
      measured: fields of ``FIELDS``; what is not given is null; device, driver, versions, commit and date are added.

    Raises:
      ValueError: a name is not in ``FIELDS``.
    """
    _refuse_unknown(measured)
    whole = dict.fromkeys(FIELDS) | environment() | measured
    return {name: whole[name] for name in FIELDS}


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file of JSON lines; fields that an older one does not have are null.

    A last one that was being written when its run was ended is left out; `append` takes it off.

    Raises:
      ValueError: a line is no record, or one has a field that is not in ``FIELDS``.
    """
    lines = path.read_bytes().split(b"\n")
    if _is_torn(lines[-1]):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            one = _object(line)
            if one is None:
                raise ValueError(f"{path}: line {number} is no record")
            _refuse_unknown(one)
            records.append({name: one.get(name) for name in FIELDS})
    return records


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        one = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return one if isinstance(one, dict) else None


def _is_torn(line: bytes) -> bool:
    """Whether a line without its line feed is the beginning of a record."""
    return line != b"" and _object(line) is None and (line.startswith(_BEGIN) or _BEGIN.startswith(line))


def _refuse_unknown(one: dict[str, Any]) -> None:
    unknown = set(one) - set(FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; a record has {', '.join(FIELDS)}")


def append(path: Path, one: dict[str, Any]) -> None:
    """Adds a record to a file of JSON lines, which is made where it does not exist.

    The beginning of one, at the end of the file, is taken off: its run was ended while it was being written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    last = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    if _is_torn(last):
        os.truncate(path, path.stat().st_size - len(last))
        last = b""
    with path.open("a") as file:
        file.write(("\n" if last else "") + json.dumps(one) + "\n")


BASELINES = {
    "dense_attention, xla": "this library's own dense attention",
    "jax.nn.dot_product_attention, cudnn": "causal cuDNN through `jax.nn.dot_product_attention`",
}


def groups(records: Iterable[dict[str, Any]], newest_only: bool = False) -> list[list[dict[str, Any]]]:
    """Records of the attention suite by device and commit, each group by case and length; of equals the newest.

    newest_only: what was measured again on a device is in the newest group alone.
    """
    found: dict[tuple, dict[tuple, dict[str, Any]]] = {}
    newest = {}
    for one in records:
        if one["suite"] == "attention":
            found.setdefault((one["device"], one["commit"]), {})[_measured(one)] = one
            newest[_measured(one)] = one
    in_order = []
    for group in found.values():
        cases = [key[:-1] for key in group]
        rows = [group[key] for key in sorted(group, key=lambda key: (cases.index(key[:-1]), key[-1]))]
        in_order.append([row for row in rows if not newest_only or newest[_measured(row)] is row])
    return [group for group in in_order if group]


def _measured(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in ("device", "case", "lists", "implementation", "tiles", "length"))


def attention_table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: for each device and commit a table of the attention suite, and below it where and with what.

    What was measured again on a device stands in the newest table alone. Columns that no row of a table has are left
    out.
    """
    tables = ["\n".join((*_rows(group), "", _caption(group))) for group in groups(records, newest_only=True)]
    return "\n\n".join(tables) or "Nothing is recorded for this release yet."


def _rows(group: Sequence[dict[str, Any]]) -> list[str]:
    differ = len({row["implementation"] for row in group}) > 1
    columns = {
        "tokens": [f"{row['length']:,}" for row in group],
        "case": [_label(row) for row in group],
        "implementation": [f"`{row['implementation']}`" if differ else "" for row in group],
        "tiles": [_tiles(row["tiles"]) for row in group],
        "density": [f"{row['density']:.2f}" if row["density"] >= 0.1 else f"{row['density']:.3f}" for row in group],
        "dense, ms": [milliseconds(row["baseline_ms"]) for row in group],
        "sparse, ms": [milliseconds(row["ms"]) for row in group],
        "of it kernel, ms": [milliseconds(row["kernel_ms"]) for row in group],
        "dense : sparse": [f"{row['baseline_ms'] / row['ms']:.2f}" for row in group],
        "kernel's rate : dense's": [
            f"{row['tflops_kept'] / row['tflops_baseline']:.2f}" if row["tflops_baseline"] else "" for row in group
        ],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _label(row: dict[str, Any]) -> str:
    parts = [row["case"]]
    if row["pattern"] not in (None, row["case"]):
        parts.append(row["pattern"])
    if row["lists"] == "activations":
        parts.append("estimated lists")
    return "; ".join(parts)


def _tiles(sizes: str | None) -> str:
    """Queries by keys of a tile, from the field of a record, which has warps and stages behind them."""
    return " x ".join(sizes.split("x")[:2]) if sizes else ""


def milliseconds(value: float | None) -> str:
    """With three digits or more."""
    if value is None:
        return ""
    return f"{value:.{0 if value >= 99.5 else 1 if value >= 9.95 else 2}f}"


def _caption(group: Sequence[dict[str, Any]]) -> str:
    first = group[0]
    shape = (
        f"Attention of {first['num_heads']} heads over {first['num_kv_heads']} KV heads, head_dim {first['head_dim']}, "
        f"{first['dtype']}"
    )
    names = ("num_heads", "num_kv_heads", "head_dim", "dtype")
    if any(row[name] != first[name] for row in group for name in names):
        shape += " where the case says nothing else"
    implementations = " and ".join(f"`{name}`" for name in dict.fromkeys(row["implementation"] for row in group))
    baselines = " and ".join(BASELINES.get(name, name) for name in dict.fromkeys(row["baseline"] for row in group))
    lists = "the kernel reads constructed lists of the stated kind, not those that were estimated"
    if any(row["lists"] == "activations" for row in group):
        lists += ", unless the case says so"
    rate = ""
    if any(row["tflops_baseline"] for row in group):
        rate = " The last column compares TFLOP/s, the kernel's on the tiles that it keeps."
    return (
        f"{shape}, implementation {implementations}. Times of sparse hold estimate, layout and kernel; {lists}.{rate} "
        f"Medians on {first['device']}; jax {first['jax']}, commit {first['commit']}, {first['date']}. "
        f"The baseline is {baselines}."
    )


def with_block(text: str, name: str, content: str) -> str:
    """A README whose block of that name, between two comments, holds this content.

    Raises:
      ValueError: the text has no such block.
    """
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the text needs a block between {first} and {last}")
    return f"{head}{first}\n{content}\n{last}{tail}"

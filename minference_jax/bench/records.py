"""One measured case as one JSON line, and README tables made from such lines."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib

FIELDS = (
    *("suite", "case", "implementation", "length", "batch", "num_heads", "num_kv_heads", "head_dim", "dtype"),
    *("density", "ms", "ms_spread", "baseline", "baseline_ms", "ratio", "tflops_kept", "error", "peak_bytes"),
    *("joules", "device", "driver", "jax", "jaxlib", "commit", "date"),
)
"""The same in every suite; null where a thing was not measured. ratio = ms / baseline_ms; ms_spread = [least, most]."""
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def device_name() -> str:
    """The device that jax computes on; for a CPU its model and the number of cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or '?'} cores"


def commit() -> str | None:
    """The commit of the source tree, with a plus where it has uncommitted changes; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def record(**measured: Any) -> dict[str, Any]:
    """A complete record.

    Args:
      measured: fields of ``FIELDS``; what is not given is null, device, versions, commit and date are added.

    Raises:
      ValueError: a name is not in ``FIELDS``.
    """
    unknown = set(measured) - set(FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; a record has {', '.join(FIELDS)}")
    made = {
        "device": device_name(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    whole = dict.fromkeys(FIELDS) | made | measured
    return {name: whole[name] for name in FIELDS}


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append(path: Path, one: dict[str, Any]) -> None:
    """Adds a record to a file of JSON lines, which is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(one) + "\n")


def attention_table(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: one row per record of the attention suite, and below it where and with what they were measured."""
    rows = [record for record in records if record["suite"] == "attention"]
    if not rows:
        return "Nothing is recorded for this release yet."
    lines = [
        "| tokens | case | density | dense, ms | sparse, ms | dense : sparse |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['length']:,} | {row['case']} | {row['density']:.2f} | {row['baseline_ms']:.0f} | {row['ms']:.0f} "
        f"| {row['baseline_ms'] / row['ms']:.2f} |"
        for row in rows
    ]
    first, *_ = rows
    lines.append("")
    lines.append(
        f"Attention of {first['num_heads']} heads over {first['num_kv_heads']} KV heads, head_dim {first['head_dim']}, "
        f"{first['dtype']}, implementation `{first['implementation']}`. Times of sparse hold estimate, layout and "
        "kernel; the kernel reads constructed lists of the stated kind, not those that were estimated. Medians on "
        f"{first['device']}; jax {first['jax']}, commit {first['commit']}, {first['date']}. The baseline is this "
        "library's own dense attention."
    )
    return "\n".join(lines)


def with_results(text: str, tables: Sequence[str]) -> str:
    """A README whose results block holds these tables.

    Raises:
      ValueError: the text has no such block.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the text needs a block between {BEGIN} and {END}")
    return head + BEGIN + "\n" + "\n\n".join(tables) + "\n" + END + tail

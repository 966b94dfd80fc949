"""Writes the tables of README.md and of RESULTS.md beside this file from the records in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from minference_jax.bench.prefill_table import Pair, prefill_groups, prefill_table
from minference_jax.bench.records import attention_table, groups, milliseconds, read, with_block

ROOT = Path(__file__).parent.parent
EVALUATED = {
    "niah": "needle in a haystack, found",
    "all": "RULER, mean of six tasks",
    "perplexity": "perplexity of a novel",
}
HEADLINE = ("VS line", "VS block")


def updated() -> dict[Path, str]:
    """The files as they should be."""
    readme, all_results = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
    of_attention = read(ROOT / "benchmarks" / "results" / "attention.jsonl")
    of_prefill = read(ROOT / "benchmarks" / "results" / "prefill.jsonl")
    of_thresholds = read(ROOT / "benchmarks" / "results" / "skip_threshold.jsonl")
    results = with_block(all_results.read_text(), "results", attention_table(of_attention))
    results = with_block(results, "thresholds", thresholds_table(of_thresholds))
    results = with_block(results, "profile", profile_table(_rows(ROOT / "benchmarks" / "results" / "profile.jsonl")))
    return {
        readme: _updated_readme(readme.read_text(), headline_table(of_attention)),
        all_results: with_block(results, "prefill", prefill_section(of_prefill)),
    }


def _updated_readme(text: str, headline: str) -> str:
    results = ROOT / "benchmarks" / "results"
    text = with_block(text, "results", headline)
    text = with_block(text, "prefill", whole_prefills_table(read(results / "prefill.jsonl")))
    text = with_block(text, "linear", linear_errors(_rows(results / "linear.jsonl")))
    text = with_block(text, "models", models_table(read(results / "models.jsonl")))
    text = with_block(text, "convert", convert_table(read(results / "convert.jsonl")))
    text = with_block(text, "search", search_table(read(results / "search.jsonl")))
    text = with_block(text, "evaluate", evaluate_table(_rows(results / "evaluate.jsonl")))
    return with_block(text, "full size", full_size_table(read(results / "full_size.jsonl")))


def prefill_section(records: list[dict[str, Any]], plots: Path = ROOT / "benchmarks" / "plots") -> str:
    """Markdown: every prefill and its parts, with their pictures."""
    kinds = {"times": "Seconds of whole prefills by length", "parts": "Parts of whole prefills"}
    shown = [
        f"![{what}](plots/{file.name})"
        for kind, what in kinds.items()
        for file in sorted(plots.glob(f"*_prefill_{kind}.png"))
    ]
    return "\n\n".join([prefill_table(records), *shown])


def thresholds_table(records: list[dict[str, Any]]) -> str:
    """Markdown: what a skip_threshold gains and costs, over the layers whose activations were taken."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for one in records:
        found.setdefault((one["case"], one["implementation"], one["skip_threshold"]), []).append(one)
    lines = []
    for (case, name, threshold), rows in sorted(found.items()):
        ratios = sorted(one["skip_ms"] / one["kernel_ms"] for one in rows)
        errors = max(one["error"] for one in rows), max(one["skip_error"] for one in rows)
        cells = [
            case,
            f"`{name}`",
            f"{threshold:g}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            *(f"{x:.4f}" for x in errors),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    head = "| attention | by | skip_threshold | kernel's time with : without | largest error without | with |"
    first = records[0]
    note = (
        f"{first['num_heads']} heads over {first['num_kv_heads']} KV heads, head_dim {first['head_dim']}, "
        f"{first['length']:,} tokens of a novel: q, k and v of layers 2, 10 and 20 of SmolLM2-135M-Instruct in "
        f"{first['dtype']}. Errors are relative, in the Frobenius norm, of a head's worst tile of queries; those "
        "without a threshold hold the check at 1,024 tokens, too."
    )
    return "\n".join([head, "|" + " --- |" * 6, *lines, "", f"{note} {_where(records)}"])


def profile_table(records: list[dict[str, Any]]) -> str:
    """Markdown: what was counted in each kernel, the newest of each kind."""
    kind = ("length", "case", "pattern", "implementation", "num_heads", "head_dim", "dtype", "device")
    records = list({tuple(one[name] for name in kind): one for one in records}.values())
    percents = {
        "tensor_cores": "tensor cores",
        "exponentials": "exponentials",
        "issue_slots": "issue slots",
        "shared_memory": "shared memory",
        "l2_out": "from L2",
        "l2_hits": "hits in L2",
        "dram": "DRAM",
    }
    lines = []
    for one in records:
        cells = [f"{one['length']:,}", f"{one['case']}; {one['pattern']}", f"{one['num_heads']}"]
        cells += [f"{one['head_dim']}, {one['dtype']}"]
        cells += [f"`{one['implementation']}`", milliseconds(one["kernel_ns"] / 1e6)]
        cells += [f"{one['copied_bytes'] / one['kernel_ns'] / 1e3:.2f}", *(f"{one[name]:.0f}" for name in percents)]
        lines.append(f"| {' | '.join(cells)} |")
    head = f"| tokens | case | heads | head_dim | by | ms | copied, TB/s | {' | '.join(percents.values())} |"
    note = (
        "Copied is what the copy engine brings to shared memory; the columns behind it are percent of what each unit "
        "could do, of hits percent of the sectors."
    )
    return "\n".join([head, "|" + " --- |" * (7 + len(percents)), *lines, "", f"{note} {_where(records)}"])


def whole_prefills_table(records: list[dict[str, Any]]) -> str:
    """Markdown: the first model's prefills by length; dense from layers that were timed where all took too long."""
    every = prefill_groups(records)
    group = next(group for group in every if group[0].any["layers"] == group[0].any["model_layers"])
    lines = []
    for pair in group:
        one = pair.any
        dense = f"{pair.dense['ms'] / 1e3:.3g}" if pair.dense else ""
        ratio = f"{1 / one['ratio']:.2f}" if pair.dense else ""
        if pair.dense is None and (layers := _dense_of_layers(one, every)):
            dense = f"{layers['extrapolated_ms'] / 1e3:.3g}, from {layers['layers']} layers"
            ratio = f"{layers['extrapolated_ms'] / one['ms']:.1f}, from {layers['layers']} layers"
        cells = [f"{one['length']:,}", one["attention"], one["kv_cache"], one["linear"] or one["dtype"], dense]
        cells += [f"{one['ms'] / 1e3:.3g}", ratio, f"{one['peak_bytes'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    head = "| tokens | attention | cache | linear layers | dense, s | sparse, s | dense : sparse | sparse, GB |"
    first = group[0].any
    note = (
        f"Whole prefills of {first['case']}'s shape with random weights, dense causal cuDNN and sparse in turn in one "
        f"process. {_lists_of(group)} {first['device']}. Every figure, parts, energy, versions and commits: "
        "[benchmarks/RESULTS.md](benchmarks/RESULTS.md#whole-prefills)."
    )
    return "\n".join([head, "|" + " --- |" * 8, *lines, "", note])


def _dense_of_layers(one: dict[str, Any], every: list[list[Pair]]) -> dict[str, Any] | None:
    """The dense prefill of the same model's first layers that says how long all of them would take."""
    same = ("device", "case", "dtype", "length", "chunk_size", "kv_cache", "linear")
    dense = (pair.dense for group in every for pair in group if pair.dense and pair.dense["extrapolated_ms"])
    return next((other for other in dense if all(other[name] == one[name] for name in same)), None)


def _lists_of(group: list[Pair]) -> str:
    """Which lists a table's sparse prefills computed."""
    lengths: dict[str, list[str]] = {}
    for one in (pair.sparse for pair in group if pair.sparse and pair.sparse["attention"] != "auto"):
        lengths.setdefault(one["lists"], []).append(f"{one['length']:,}")
    said = "; ".join(f"{lists} ({', '.join(dict.fromkeys(places))})" for lists, places in lengths.items())
    pattern = next(pair.sparse["pattern"] for pair in group if pair.sparse)
    return f"Pattern: {pattern}; lists from {said}."


def headline_table(records: list[dict[str, Any]]) -> str:
    """Markdown: dense against vertical-slash attention of both granularities by length, the fastest implementation."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in (row for group in groups(records, newest_only=True) for row in group):
        if row["device"].startswith("NVIDIA") and row["case"] in HEADLINE and row["lists"] == "constructed":
            found.setdefault((row["length"], row["case"]), []).append(row)
    best = {key: min(rows, key=lambda row: row["ms"]) for key, rows in found.items()}
    lines = []
    for length in sorted({length for length, _ in best}):
        line, block = (best.get((length, case)) for case in HEADLINE)
        cells = [f"{length:,}", _of(line or block, "baseline_ms")]
        for row in (line, block):
            cells += [_of(row, "ms"), f"{row['baseline_ms'] / row['ms']:.1f}" if row else "", _named(row)]
        lines.append(f"| {' | '.join(cells)} |")
    head = "| tokens | dense, ms | line, ms | dense : line | by | block, ms | dense : block | by |"
    (shape,) = {
        tuple(row[name] for name in ("num_heads", "num_kv_heads", "head_dim", "dtype")) for row in best.values()
    }
    (device,) = {row["device"] for row in best.values()}
    note = (
        "Attention of one layer, estimate and layout included: {} heads over {} KV heads, head_dim {}, {}; the lists "
        "of VS(verticals, slashes) are constructed: {}. Dense is causal cuDNN in the same run."
    ).format(*shape, "; ".join(f"{name} ({places})" for name, places in _patterns(best).items()))
    where = f"{device}. Cases, densities, versions and commits: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    return "\n".join([head, "|" + " --- |" * 8, *lines, "", f"{note} {where}"])


def _patterns(best: dict[tuple[int, str], dict[str, Any]]) -> dict[str, str]:
    """Each pattern of the rows, and at which lengths it is theirs."""
    lengths: dict[str, set[int]] = {}
    for (length, _), row in sorted(best.items()):
        lengths.setdefault(row["pattern"], set()).add(length)
    return {name: ", ".join(f"{length:,}" for length in sorted(found)) for name, found in lengths.items()}


def _of(row: dict[str, Any] | None, name: str) -> str:
    return milliseconds(row[name]) if row else ""


def _named(row: dict[str, Any] | None) -> str:
    return f"`{row['implementation']}`" if row else ""


def models_table(records: list[dict[str, Any]]) -> str:
    """Markdown: for each class of transformers the cases compared with it, and the largest error."""
    classes: dict[str, list[dict[str, Any]]] = {}
    rows = _last_run(records)
    for one in rows:
        classes.setdefault(one["baseline"].removeprefix("transformers, "), []).append(one)
    lines = [
        f"| `{name}` | {', '.join(one['case'].replace('_', ' ') for one in group)} | "
        f"{max(one['error'] for one in group):.1e} |"
        for name, group in classes.items()
    ]
    head = ["| transformers' class | cases | largest error |", "| --- | --- | --- |"]
    note = "The largest difference of logits over the largest logit, float32."
    return "\n".join([*head, *lines, "", f"{note} {_where(rows)}"])


def linear_errors(records: list[dict[str, Any]]) -> str:
    """Markdown: what 8-bit linear layers cost the default model, by the last record of `evaluate linear --json`."""
    last = records[-1]
    off = [statistics.fmean(layers) for layers in last["products"].values()]
    where = f"{last['model']} on the first {last['tokens']:,} tokens of `examples/persuasion.txt`, in {last['dtype']}"
    products = f"each product is off by {min(off):.1%} to {max(off):.1%} (Frobenius norm, mean over the layers)"
    perplexity = f"perplexity goes from {last['exact_perplexity']:.2f} to {last['perplexity']:.2f}"
    greedy = f"the same token is likeliest at {last['greedy']:.0%} of the places"
    return f"It changes the answers. {where}: {products}, {perplexity}, and {greedy}. {_where([last])}"


def convert_table(records: list[dict[str, Any]]) -> str:
    """Markdown: each step against a plain read of the same files, and the host memory that it took."""
    rows = _last_run(records)
    lines = [
        f"| {one['case']} | {one['ms'] / 1e3:.1f} | {one['baseline_ms'] / 1e3:.1f} | {one['ratio']:.2f} | "
        f"{one['peak_bytes'] / 1e9:.2f} |"
        for one in rows
    ]
    head = ["| step | seconds | plain read, seconds | ratio | host memory, GB |", "| --- | --- | --- | --- | --- |"]
    size = int(rows[0]["baseline"].split()[3])
    note = f"A Hugging Face folder of {size / 1e9:.2f} GB; on a CPU what is loaded is in host memory, too."
    return "\n".join([*head, *lines, "", f"{note} {_where(rows)}"])


def full_size_table(records: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each step with weights of true size; of the prefills after the first, the median."""
    rows = _last_run(records)
    steps = ("convert", "load", "prefill dense", "prefill vertical_slash")
    lines = []
    for model in dict.fromkeys(", ".join(one["case"].split(", ")[:2]) for one in rows):
        of_model = [one for one in rows if one["case"].startswith(model) and "compile" not in one["case"]]
        by_step = {step: [one for one in of_model if f", {step}" in one["case"]] for step in steps}
        seconds = [f"{statistics.median(one['ms'] for one in by_step[step]) / 1e3:.2f}" for step in steps]
        (density,) = {one["density"] for one in by_step[steps[-1]]}
        lines.append(f"| {model} | {' | '.join(seconds)} | {density:.2f} |")
    head = "| model | convert, s | load, s | prefill dense, s | prefill vertical-slash, s | its density |"
    ruler = "| --- | --- | --- | --- | --- | --- |"
    prefills = next(one for one in reversed(rows) if one["pattern"])
    note = f"Random bfloat16 weights; prefill of {prefills['length']:,} tokens, the pattern {prefills['pattern']}."
    return "\n".join([head, ruler, *lines, "", f"{note} {_where(rows)}"])


def search_table(records: list[dict[str, Any]]) -> str:
    """Markdown: of the last run what was searched beside uniform patterns, with density and error on unseen prompts."""
    rows = _last_run_rows(records, ("device", "date", "jax"))
    prompts = list(dict.fromkeys(one["case"].partition(", unseen ")[2] for one in rows))
    found = {tuple(one["case"].split(", unseen ")): one for one in rows}
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = [f"{found[name, prompt]['density']:.3f} | {found[name, prompt]['error']:.4f}" for prompt in prompts]
        sizes = found[name, prompts[0]]["pattern"]
        lines.append(f"| {name if sizes is None else f'{name}: `{sizes}`'} | {' | '.join(cells)} |")
    head = f"| patterns | {' | '.join(f'{prompt}: density | error' for prompt in prompts)} |"
    ruler = f"| --- |{' --- | --- |' * len(prompts)}"
    note = (
        f"SmolLM2-135M-Instruct at {max(one['length'] for one in rows):,} tokens, prompts that the search did not see. "
        f"The error is that of a layer's attention output, relative to dense, mean over the layers. On the calibration "
        f"prompts, key-value retrieval and a part of Python's manual, those at one budget cost the same."
    )
    return "\n".join([head, ruler, *lines, "", f"{note} {_where(rows)}"])


def evaluate_table(records: list[dict[str, Any]]) -> str:
    """Markdown: of the last run, per benchmark and length dense's value and how the others differ, with intervals."""
    last = [one for one in _last_run_rows(records) if one["positions"] is None and one["task"] in EVALUATED]
    names = list(dict.fromkeys(one["attention"] for one in last if one["attention"] != "dense"))
    found = {(one["task"], one["length"], one["attention"]): one for one in last}
    lines = [f"| benchmark | tokens | dense | {' | '.join(names)} |", f"| --- | --- | --- |{' --- |' * len(names)}"]
    for task, what in EVALUATED.items():
        for length in sorted({one["length"] for one in last}):
            dense = found[task, length, "dense"]
            cells = [f"{dense['value']:.3g}, {dense['low']:.3g} to {dense['high']:.3g}"]
            for one in (found[task, length, name] for name in names):
                low, high = one["difference_low"], one["difference_high"]
                cells.append(f"{one['value']:.3g}; {low:+.3f} to {high:+.3f}; {one['density']:.2f}")
            lines.append(f"| {what} | {length:,} | {' | '.join(cells)} |")
    note = (
        "SmolLM2-135M-Instruct in bfloat16. Dense: value and its 95% interval. Others: value; 95% interval of the "
        "difference from dense on the same samples, for perplexity of the logarithm; density of the computed tiles. "
        f"{_where(last)}"
    )
    return "\n".join([*lines, "", note])


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of `evaluate --summary`, `evaluate linear --json` or profile_kernel.py, not with the fields of `read`."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _last_run_rows(
    records: list[dict[str, Any]], same: tuple[str, ...] = ("device", "commit", "jax")
) -> list[dict[str, Any]]:
    return [one for one in records if all(one[name] == records[-1][name] for name in same)]


def _last_run(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest record of each case, of those from where and what the last one is."""
    return list({one["case"]: one for one in _last_run_rows(records)}.values())


def _where(records: list[dict[str, Any]]) -> str:
    said = [sorted({part for one in records for part in one[name].split(" and ")}) for name in ("commit", "date")]
    commits, dates = (" and ".join(parts) for parts in said)
    return f"{records[0]['device']}; jax {records[0]['jax']}, commit {commits}, {dates}."


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text)
